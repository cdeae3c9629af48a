"""Runs a Python program as a child process and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, cast

import psutil

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
LOG_CLOSE_SECONDS, LAST_WORDS_SECONDS = 10.0, 2.0
TAIL_BYTES = 200_000
LINE_BYTES, BLOCK_BYTES = 1 << 20, 1 << 16
_PR_SET_PDEATHSIG = 1


class ChildProcess:
    """A Python program in a session, with a log file and a temporary folder of its own.

    The program starts at once. A context manager: at its end, every process that the program
    started, its temporary folder and its shared memory are gone.

    Args:
        arguments: of Python.
        environment: variables on top of the caller's, given the temporary folder.
        mask: takes secrets out of the output before it is written to the log file.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Callable[[Path], dict[str, str]],
        mask: Callable[[str], str] = str,
    ) -> None:
        self.marker = uuid.uuid4().hex
        self._mask = mask
        self._log_file: Path | None = None
        self._log_thread: threading.Thread | None = None
        self._shared_before = _shared_memory_files()
        # Short, since Ray puts sockets below it and a socket's path is limited to 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="hpo-", ignore_cleanup_errors=True)
        self.temporary = Path(self._folder.name)
        self._child = subprocess.Popen(  # noqa: S603
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            env={
                **os.environ,
                **environment(self.temporary),
                MARKER: self.marker,
                FAILURE_VARIABLE: str(self.temporary / FAILURE_NAME),
            },
        )
        self._stdin = cast("IO[bytes]", self._child.stdin)
        self._output = cast("IO[bytes]", self._child.stdout)

    def __enter__(self) -> ChildProcess:
        return self

    def go(self, log_file: Path, line: str = "") -> None:
        """Let the program run: send it the line that it waits for on its standard input.

        The output of all processes is appended to the log file.
        """
        self._log_file = log_file
        self._log_thread = threading.Thread(
            target=copy_masked,
            args=(self._output, log_file.open("ab"), self._mask),
            name="masked log",
            daemon=True,
        )
        self._log_thread.start()
        # A program that has ended already is found by `wait`.
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(f"{line}\n".encode())
        self._stdin.close()

    def wait(self, on_poll: Callable[[], None]) -> int:
        """Wait for the end, calling `on_poll` about three times a second; return the exit code."""
        while self._child.poll() is None:
            on_poll()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(POLL_SECONDS)
        on_poll()
        return self._child.returncode

    def failure(self) -> str:
        """Why the program failed: what it reported, or else its signal and last line of output."""
        reported = self.temporary / FAILURE_NAME
        if reported.is_file():
            return self._mask(reported.read_text(encoding="utf-8"))
        last = "no output"
        if self._log_thread is not None and self._log_file is not None:
            # The last words may be under way; other processes of the run may write for longer.
            self._log_thread.join(LAST_WORDS_SECONDS)
            last = last_line(tail(self._log_file))
        if self._child.returncode >= 0:
            return last
        number = -self._child.returncode
        names = {entry.value: entry.name for entry in signal.Signals}
        name = names.get(number, f"signal {number}")
        return f"verl's main program was ended by {name}; {last}"

    def __exit__(self, *error: object) -> None:
        # A further Ctrl-C must not leave half of the processes running.
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        try:
            self._stdin.close()
            if self._child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._child.pid, signal.SIGTERM)
            end_processes(lambda: marked_processes(self.marker))
            self._child.wait()
            if self._log_thread is not None:
                self._log_thread.join(LOG_CLOSE_SECONDS)
            else:
                self._output.close()
            remove_shared_memory(_shared_memory_files() - self._shared_before)
            self._folder.cleanup()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def copy_masked(pipe: IO[bytes], file: IO[bytes], mask: Callable[[str], str]) -> None:
    """Copy the output of processes to a file, without secrets, until the last process ends.

    verl prints its whole configuration, and libraries print what they were given. The mask is
    applied to whole lines, so that no secret is cut in two; a line without an end is written
    once it is longer than `LINE_BYTES`. The pipe is unbuffered; both are closed at the end.
    """

    def write(block: bytes) -> None:
        text = block.decode(errors="surrogateescape")
        file.write(mask(text).encode(errors="surrogateescape"))
        file.flush()

    rest = b""
    with pipe, file:
        while block := pipe.read(BLOCK_BYTES):
            rest += block
            end = rest.rfind(b"\n") + 1 or (len(rest) if len(rest) > LINE_BYTES else 0)
            write(rest[:end])
            rest = rest[end:]
        write(rest)


def marked_processes(marker: str) -> list[psutil.Process]:
    """Living processes, other than this one, that a run with this marker started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            alive = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARKER) == marker:
                found.append(process)
    return found


def end_processes(find: Callable[[], list[psutil.Process]]) -> None:
    """Ask processes to end; kill those that are stopped, or have not ended in `STOP_SECONDS`."""
    deadline = time.monotonic() + STOP_SECONDS
    asked: set[int] = set()
    empty_looks = 0
    # Two looks: a process that becomes another program has no environment for a moment.
    while empty_looks < 2:
        processes = find()
        empty_looks = 0 if processes else empty_looks + 1
        for process in processes:
            with contextlib.suppress(psutil.Error):
                # A stopped process would take the request only after it goes on.
                if time.monotonic() > deadline or process.status() == psutil.STATUS_STOPPED:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
        time.sleep(POLL_SECONDS)


def _shared_memory_files() -> set[str]:
    """Names of this user's files; nobody can see who has mapped the files of others."""
    found = set()
    for path in SHARED_MEMORY.iterdir() if SHARED_MEMORY.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            ours = path.lstat().st_uid == os.getuid()
            if ours and path.name.startswith(SHARED_MEMORY_PREFIXES):
                found.add(path.name)
    return found


def remove_shared_memory(names: set[str]) -> None:
    """Remove shared-memory files that no living process has mapped."""
    if not names:
        return
    mapped = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mapped |= {region.path for region in process.memory_maps(grouped=True)}
    for path in (SHARED_MEMORY / name for name in names):
        if str(path) not in mapped:
            path.unlink(missing_ok=True)


def tail(log_file: Path) -> str:
    """The end of a log that may be long."""
    with log_file.open("rb") as log:
        log.seek(max(0, log_file.stat().st_size - TAIL_BYTES))
        return log.read().decode(errors="replace")


def last_line(text: str) -> str:
    """The last line that is not empty."""
    lines = (line.strip() for line in reversed(text.split("\n")))
    return next(filter(None, lines), "no output")
