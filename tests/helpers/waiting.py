"""Waits for what must come."""

import time


def wait_until(condition, seconds, told=lambda: ""):
    """Wait until a condition holds. The bound ends a wait for what will never come.

    Args:
        condition: called until it is true.
        seconds: far more than it takes.
        told: what to say where it never holds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)
