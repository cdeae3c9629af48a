"""How a transfer of weights to a rollout server ends where the server fails.

An error of the server ends the run at once. The time limit, one setting for every kind of
server in verl's own place for further settings of a rollout, is for one that says nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import zmq
from ray.exceptions import RayError

from hpo_verl.core.settings import require_number
from hpo_verl.errors import WeightSyncError

KEY = "actor_rollout_ref.rollout.custom.weight_update_timeout"
DEFAULT_SECONDS = 300.0
# How often a waiting sender looks at the server's reply.
POLL_MILLISECONDS = 100


def weight_update_timeout(rollout: Any) -> float:
    """Seconds (> 0, else a ConfigError) that the server may take over one bucket of weights."""
    seconds = (rollout.get("custom") or {}).get(KEY.rsplit(".", 1)[-1], DEFAULT_SECONDS)
    require_number(KEY, seconds, 0, open_low=True)
    return float(seconds)


def too_late(what: str, seconds: float) -> WeightSyncError:
    """The error of a server that did not take something in time."""
    return WeightSyncError(
        f"the rollout server did not take {what} within {seconds:g} s; the limit is {KEY}"
    )


def server_failed(error: BaseException) -> WeightSyncError:
    """The error of a transfer that failed on the server's side."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return WeightSyncError(
        f"the rollout server failed to take the weights: {lines[-1] if lines else repr(error)}"
    )


async def within(reply: Awaitable[Any], seconds: float, what: str) -> None:
    """Wait for the server's reply; raise a WeightSyncError where it fails or is too late."""
    try:
        await asyncio.wait_for(reply, seconds)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise too_late(what, seconds) from error
    except RayError as error:
        raise server_failed(error) from error


class WatchedSocket:
    """The sender's socket, bound to a file; its waits end with the server's error or in time.

    `reply` is the server's to the whole transfer; None for a rank that another one speaks for.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], file: Path, seconds: float, reply: Future[Any] | None
    ) -> None:
        self._socket = socket
        self._file = file
        self._seconds = seconds
        self._reply = reply

    def send_pyobj(self, message: Any) -> None:
        """Send, once the server is connected."""
        self._wait(zmq.POLLOUT)
        # A connection needs the file no longer, and none stays where the run is killed.
        self._file.unlink(missing_ok=True)
        self._socket.send_pyobj(message)

    def recv(self) -> bytes:
        """The server's next answer."""
        self._wait(zmq.POLLIN)
        return self._socket.recv()

    def close(self) -> None:
        """Close, and drop what was not taken."""
        self._socket.close(linger=0)

    def _wait(self, event: int) -> None:
        deadline = time.monotonic() + self._seconds
        while not self._socket.poll(POLL_MILLISECONDS, event):
            # A reply without an error comes after the last answer, which is then here too.
            reply = self._reply
            if reply is not None and reply.done() and (error := reply.exception()) is not None:
                raise server_failed(error) from error
            if time.monotonic() > deadline:
                raise too_late("a bucket of weights", self._seconds)
