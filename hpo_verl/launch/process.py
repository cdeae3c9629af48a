"""Runs verl as a child process and leaves nothing of it behind."""

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

from hpo_verl.launch.masked_log import MaskedLog
from hpo_verl.launch.stop import SIGNALS
from hpo_verl.launch.watch import MARKER, ProcessWatch, signal_name

# Names of the shared-memory files that verl's weight transfer and Python make; vLLM ends
# its processes before Python's own tracker has removed their semaphores.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
SHARED_MEMORY_PREFIXES = ("verl_weights_", "psm_", "torch_", "sem.mp-")
STOP_SECONDS = 15.0
POLL_SECONDS = 0.3
_PR_SET_PDEATHSIG = 1


class ProcessLost(RuntimeError):
    """A process without which the run cannot go on is dead or stopped; the message names it."""


class TrainingProcess:
    """verl's main program in a session, with a log file and a temporary folder of its own.

    A context manager: whatever happens inside, every process that the run
    started, its temporary folder and its shared memory are gone afterwards.

    Args:
        arguments: of `python -m verl.trainer.main_ppo`.
        log_file: takes the output of all of the run's processes.
        environment: variables on top of the caller's, given the temporary folder.
        mask: takes secrets out of the output before it gets into the log file.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log_file: Path,
        environment: Callable[[Path], dict[str, str]],
        mask: Callable[[str], str] = str,
    ) -> None:
        self.arguments = arguments
        self.log_file = log_file
        self.environment = environment
        self.mask = mask
        self.marker = uuid.uuid4().hex
        self._child: subprocess.Popen[bytes] | None = None
        self._log: MaskedLog | None = None
        self._temporary: Path | None = None
        self._shared_before: set[str] = set()
        self._death = ""
        self._logged_before_death = 0

    def __enter__(self) -> TrainingProcess:
        # Short, since Ray puts sockets below it and a socket's path is limited to 107 bytes.
        self._temporary = Path(tempfile.mkdtemp(prefix="hpo-"))
        self._shared_before = _shared_memory_files()
        self._log = MaskedLog(self.log_file, self.mask)
        self._child = subprocess.Popen(  # noqa: S603
            self.command(self._temporary),
            stdin=subprocess.DEVNULL,
            stdout=self._log.fileno(),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            env={**os.environ, **self.environment(self._temporary), MARKER: self.marker},
        )
        self._log.start()
        return self

    def command(self, temporary: Path) -> list[str]:
        """The child's command line, given the run's temporary folder."""
        return [
            *(sys.executable, "-m", "verl.trainer.main_ppo"),
            *self.arguments,
            f"++ray_kwargs.ray_init._temp_dir={temporary}",
        ]

    def wait(self, on_poll: Callable[[], None]) -> int:
        """Wait for the end, calling `on_poll` about three times a second; return the exit code.

        Raises:
            ProcessLost: a process of the run died or was stopped, and the run does not end.
        """
        child = self._require_child()
        with ProcessWatch(self.marker, on_death=self._note_death) as watch:
            while child.poll() is None:
                on_poll()
                watch.wait(POLL_SECONDS)
                self._death = watch.death.shown if watch.death else ""
                if problem := watch.problem():
                    raise ProcessLost(problem)
        on_poll()
        return child.returncode

    def _note_death(self) -> None:
        self._logged_before_death = self.log_file.stat().st_size

    def failure(self) -> str:
        """Why the run failed: the process that died, and the last error in the log."""
        child = self._require_child()
        error = last_error(self.log_file)
        if child.returncode < 0:
            return f"verl's main program was ended by {signal_name(-child.returncode)}; {error}"
        # A run that fails for another reason ends its processes only after it has said so.
        if self._death and has_error(self.log_file, self._logged_before_death):
            return f"{self._death}; {error}"
        return error

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


def last_error(log_file: Path) -> str:
    """The last error message in a log: what a worker said before the run ended."""
    return last_error_line(_last_lines(log_file))


def has_error(log_file: Path, start: int) -> bool:
    """Whether an error's message stands in a log after so many bytes."""
    return any(map(_looks_like_error, _last_lines(log_file, start)))


def _last_lines(log_file: Path, start: int = 0, tail_bytes: int = 200_000) -> list[str]:
    with log_file.open("rb") as log:
        log.seek(max(start, log_file.stat().st_size - tail_bytes))
        return log.read().decode(errors="replace").splitlines()


def last_error_line(lines: Sequence[str]) -> str:
    """The last line that is an error's message, or else the last line."""
    errors = [line.strip() for line in lines if _looks_like_error(line)]
    return errors[-1] if errors else (lines[-1].strip() if lines else "no output")


def _looks_like_error(line: str) -> bool:
    head = line.split("[0m", 1)[-1].strip().split(":", 1)[0]
    name = head.rsplit(".", 1)[-1]
    return name.isidentifier() and name.endswith(("Error", "Exception", "Interrupt", "Exit"))
