"""Runs a Python program as a child process and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from hpo_verl.runs.masked_log import MaskedLog
from hpo_verl.runs.stop import SIGNALS

# Every process of a run inherits it, however often it changes parent or group.
MARKER = "HPO_VERL_RUN"
# The file in which the program says why it failed.
FAILURE_VARIABLE, FAILURE_NAME = "HPO_VERL_FAILURE", "failure"

# Names of the shared-memory files that verl's weight transfer and Python make; vLLM ends
# its processes before Python's own tracker has removed their semaphores.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
SHARED_MEMORY_PREFIXES = ("verl_weights_", "psm_", "torch_", "sem.mp-")
STOP_SECONDS = 15.0
POLL_SECONDS = 0.3
TAIL_BYTES = 200_000
_PR_SET_PDEATHSIG = 1


class ChildProcess:
    """A Python program in a session, with a log file and a temporary folder of its own.

    A context manager: whatever happens inside, every process that the program
    started, its temporary folder and its shared memory are gone afterwards.

    Args:
        arguments: of Python, given the temporary folder.
        environment: variables on top of the caller's, given the temporary folder.
        mask: takes secrets out of the output before it gets into the log file.
    """

    def __init__(
        self,
        arguments: Callable[[Path], Sequence[str]],
        environment: Callable[[Path], dict[str, str]],
        mask: Callable[[str], str] = str,
    ) -> None:
        self.arguments = arguments
        self.environment = environment
        self.mask = mask
        self.marker = uuid.uuid4().hex
        self.log_file: Path | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._log: MaskedLog | None = None
        self._temporary: Path | None = None
        self._shared_before: set[str] = set()

    def __enter__(self) -> ChildProcess:
        # Short, since Ray puts sockets below it and a socket's path is limited to 107 bytes.
        self._temporary = Path(tempfile.mkdtemp(prefix="hpo-"))
        self._shared_before = _shared_memory_files()
        self._log = MaskedLog(self.mask)
        self._child = subprocess.Popen(  # noqa: S603
            [sys.executable, *self.arguments(self._temporary)],
            stdin=subprocess.PIPE,
            stdout=self._log.fileno(),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            env={
                **os.environ,
                **self.environment(self._temporary),
                MARKER: self.marker,
                FAILURE_VARIABLE: str(self._temporary / FAILURE_NAME),
            },
        )
        self._log.close_writing()
        return self

    def go(self, log_file: Path, line: str = "") -> None:
        """Let the program run: send it a line on its standard input, which then ends.

        Args:
            log_file: takes the output of all of its processes, made anew.
            line: what it waits for.
        """
        child, log = self._require_child(), self._log
        if log is None or child.stdin is None:
            raise RuntimeError("the process was not started")
        self.log_file = log_file
        log.start(log_file)
        # Where it has ended already, its exit code tells.
        with contextlib.suppress(BrokenPipeError), child.stdin as stream:
            stream.write(f"{line}\n".encode())

    def wait(self, on_poll: Callable[[], None]) -> int:
        """Wait for the end, calling `on_poll` about three times a second; return the exit code."""
        child = self._require_child()
        while child.poll() is None:
            on_poll()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_SECONDS)
        on_poll()
        return child.returncode

    def failure(self) -> str:
        """Why the program failed: what it reported, or else its signal and last line of output."""
        child = self._require_child()
        if self._temporary is not None and (self._temporary / FAILURE_NAME).is_file():
            return self.mask((self._temporary / FAILURE_NAME).read_text(encoding="utf-8"))
        said = last_line(self.log_file) if self.log_file else "no output"
        if child.returncode < 0:
            return f"verl's main program was ended by {signal_name(-child.returncode)}; {said}"
        return said

    @property
    def temporary(self) -> Path:
        """The private temporary folder."""
        if self._temporary is None:
            raise RuntimeError("the process was not started")
        return self._temporary

    def _require_child(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            raise RuntimeError("the process was not started")
        return self._child

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A further Ctrl-C must not leave half of the processes running.
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        try:
            child = self._require_child()
            if child.stdin is not None:
                child.stdin.close()
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGTERM)
            end_processes(lambda: marked_processes(self.marker))
            child.wait()
            if self._log is not None:
                self._log.close()
            remove_shared_memory(_shared_memory_files() - self._shared_before)
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def marked_processes(marker: str) -> list[psutil.Process]:
    """Living processes, other than this one, that a run with this marker started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            alive = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARKER) == marker:
                found.append(process)
    return found


def _find_again(find: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    time.sleep(POLL_SECONDS)
    return find()


def end_processes(find: Callable[[], list[psutil.Process]]) -> None:
    """Ask processes to end; kill those that are stopped, or have not after `STOP_SECONDS`."""
    deadline = time.monotonic() + STOP_SECONDS
    asked: set[int] = set()
    # Twice: one that just then became another program could not be told by its environment.
    while processes := find() or _find_again(find):
        overdue = time.monotonic() > deadline
        for process in processes:
            with contextlib.suppress(psutil.Error):
                # A stopped one would take the request only after it goes on.
                if overdue or process.status() == psutil.STATUS_STOPPED:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
        time.sleep(POLL_SECONDS)


def _shared_memory_files() -> set[str]:
    if not SHARED_MEMORY.is_dir():
        return set()
    found = set()
    for entry in os.scandir(SHARED_MEMORY):
        # Others' files are not ours to remove, nor can we see who has mapped them.
        with contextlib.suppress(FileNotFoundError):
            ours = entry.stat(follow_symlinks=False).st_uid == os.getuid()
            if ours and entry.name.startswith(SHARED_MEMORY_PREFIXES):
                found.add(entry.name)
    return found


def remove_shared_memory(names: set[str]) -> None:
    """Remove shared-memory files that no living process has mapped."""
    if not names:
        return
    mapped = set(_mapped_shared_memory())
    for name in names - mapped:
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def _mapped_shared_memory() -> Iterator[str]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            for region in process.memory_maps(grouped=True):
                if region.path.startswith(f"{SHARED_MEMORY}/"):
                    yield Path(region.path).name


def last_line(log_file: Path) -> str:
    """The last line of a log that is not empty."""
    with log_file.open("rb") as log:
        log.seek(max(0, log_file.stat().st_size - TAIL_BYTES))
        lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    known = {entry.value: entry.name for entry in signal.Signals}
    return known.get(number, f"signal {number}")
