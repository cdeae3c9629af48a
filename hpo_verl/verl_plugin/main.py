"""verl's main program as the launcher starts it: `python -m hpo_verl.verl_plugin.main`.

It imports verl, waits until the launcher has checked the run and sends its arguments (one line
of JSON on standard input), and runs verl. If verl fails, the reason is written to the file that
`HPO_VERL_FAILURE` names: the actor or node whose death Ray records, and the exception. If an
actor or node dies and verl does not end, this program ends the run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from hpo_verl.runs.process import FAILURE_VARIABLE

LOOK_SECONDS = 2.0
# After a death verl has this long to end by itself, with a message of its own.
GRACE_SECONDS = 30.0
# Ray may record a death a moment after a call to the dead actor has failed.
RECORD_SECONDS = 3.0
EXIT_LOST = 1


def arguments() -> list[str] | None:
    """The arguments that the launcher sends; None if the launcher has ended instead."""
    line = sys.stdin.readline()
    # Ray's processes inherit standard input, and must not keep the launcher's pipe.
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return json.loads(line) if line.strip() else None


def report(reason: str) -> None:
    """Tell the launcher why the run failed."""
    path = os.environ.get(FAILURE_VARIABLE)
    if path:
        Path(path).write_text(reason, encoding="utf-8", errors="backslashreplace")


def root_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised; Ray wraps it in errors about the tasks that failed."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    return error


def one_line(error: BaseException) -> str:
    """Class and message of an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


class Watch(threading.Thread):
    """Ends the run if an actor or a node of it dies and verl does not end."""

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        from hpo_verl.verl_plugin.ray_record import RayRecord

        self._record = RayRecord()
        self._lock = threading.Lock()
        self._first: str | None = None
        self.verl_ended = threading.Event()

    def run(self) -> None:
        """Look at Ray's record until verl has ended; end this process after a death."""
        while not self.death():
            if self.verl_ended.wait(LOOK_SECONDS):
                return
        if self.verl_ended.wait(GRACE_SECONDS):
            return
        reason = f"{self.death()}, and verl did not end within {GRACE_SECONDS:g} s"
        report(reason)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)

    def death(self) -> str | None:
        """The first death that Ray records; None without one, or if Ray does not answer."""
        import ray

        with self._lock:
            try:
                if self._first is None and ray.is_initialized():
                    self._first = next(iter(self._record.deaths()), None)
            except Exception as error:
                # Ray's own client ends this process if its server stays away.
                print(f"WARN: Ray's record cannot be read: {one_line(error)}", flush=True)
        return self._first


def reason_of(error: BaseException, watch: Watch) -> str:
    """Why verl failed: the first death, if any, and the exception unless it is about that death."""
    from ray.exceptions import RayActorError, RayError

    cause = root_cause(error)
    # An error of Ray itself is about something that is gone; a node's death is recorded late.
    seconds = GRACE_SECONDS if isinstance(cause, RayError) else RECORD_SECONDS
    deadline = time.monotonic() + seconds
    while not (death := watch.death()) and time.monotonic() < deadline:
        time.sleep(0.2)
    if death is None:
        return one_line(cause)
    return death if isinstance(cause, RayActorError) else f"{death}; {one_line(cause)}"


def main() -> None:
    """Run verl, and report why it failed."""
    from verl.trainer import main_ppo

    given = arguments()
    if given is None:
        return
    sys.argv[1:] = given
    watch = Watch()
    watch.start()
    try:
        main_ppo.main()
    except Exception as error:
        watch.verl_ended.set()
        report(reason_of(error, watch))
        raise
    finally:
        watch.verl_ended.set()


if __name__ == "__main__":
    main()
