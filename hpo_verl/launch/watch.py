"""Finds out which process of a run died first, and which one does not run any more.

Ray and verl notice a dead process late and report what failed next, seldom the
process itself; a stopped one (SIGSTOP) they wait for without end. Whoever looks
at the processes from outside sees both at once, whatever their role.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# Every process of a run inherits it, however often it changes parent or group.
MARKER = "HPO_VERL_RUN"
# How often new processes are looked for, and each is asked whether it is stopped.
LOOK_SECONDS = 1.0
# A process that was found stopped so many times in a row counts as lost. Looks, not
# seconds: where the whole job is suspended, the launcher does not look either.
STOPPED_LOOKS = 20
# verl gets so long to end by itself after a death, since it may have more to say.
DEATH_SECONDS = 60.0
# `GuardedFunction` starts a new one where a reward ends, or stops, its process.
REPLACED = "hpo_verl.rewards.scoring_process"
RAY_NODE = ("raylet", "gcs_server")
ROLES = {
    "TaskRunnerV1": "trainer",
    "WorkerDict": "actor worker",
    "HFServer": "rollout server",
    "vLLMHttpServer": "rollout server",
    "CoalescingAgentLoopWorker": "agent-loop worker",
    "AgentLoopWorkerTQ": "agent-loop worker",
    "RewardLoopWorker": "reward worker",
    "TransferQueueController": "TransferQueue",
    "SimpleStorageUnit": "TransferQueue",
    "raylet": "Ray node",
    "gcs_server": "Ray node",
}
# An actor's process is named after its class, `ray::WorkerDict.update_actor`, a rollout
# engine's after its part, `VLLM::EngineCore`; one that only waits for work is ray::IDLE.
_ACTOR = re.compile(r"\w+::(?!IDLE|SPILL|RESTORE|DELETE)([A-Z]\w*)")
# Places in /proc/<pid>/stat after the state, and of the ioctl on a pidfd.
_STAT_EXIT_CODE = 48
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_INFO = struct.Struct("Q52xi")


@dataclass
class Watched:
    """A process of the run, as it was last seen.

    Attributes:
        process: to ask it.
        parent: process id of its parent when it was first seen.
        title: its command line in one word.
        descriptor: its pidfd, which tells its end; -1 where the system has none.
        stopped_looks: how often in a row it was found stopped.
    """

    process: psutil.Process
    parent: int
    title: str
    descriptor: int
    stopped_looks: int = 0

    @property
    def shown(self) -> str:
        """Role, name and process id, for a message."""
        actor = _ACTOR.match(self.title)
        name = actor.group(1) if actor else self.title
        known = f"{name}, process {self.process.pid}"
        return f"the {ROLES[name]} ({known})" if name in ROLES else known

    @property
    def essential(self) -> bool:
        """Whether the run cannot go on without it."""
        return self.title in RAY_NODE or _ACTOR.match(self.title) is not None

    def ended(self, readable: Container[int]) -> bool:
        """Whether it has ended, given the descriptors that say so."""
        return (
            self.descriptor in readable if self.descriptor >= 0 else not self.process.is_running()
        )

    def close(self) -> None:
        """Give the descriptor back."""
        if self.descriptor >= 0:
            os.close(self.descriptor)


@dataclass(frozen=True)
class Death:
    """The end of a process without which the run cannot go on.

    Attributes:
        shown: which one and how it ended, for a message.
        seconds: when, on the monotonic clock.
    """

    shown: str
    seconds: float


class ProcessWatch:
    """Watches the processes of one run; a context manager.

    Args:
        marker: the value of `MARKER` in their environment.
        on_death: called once, at the first death that is not a regular exit.
    """

    def __init__(self, marker: str, on_death: Callable[[], None] = lambda: None) -> None:
        self.marker = marker
        self.death: Death | None = None
        self._on_death = on_death
        self._watched: dict[int, Watched] = {}
        self._others: set[int] = {os.getpid()}
        self._doubtful: set[int] = set()
        self._poll = select.poll()
        self._next_look = 0.0

    def __enter__(self) -> ProcessWatch:
        return self

    def __exit__(self, *_: object) -> None:
        for watched in self._watched.values():
            watched.close()
        self._watched.clear()

    def wait(self, seconds: float) -> None:
        """Wait, at most so long, for a process of the run to end; look at the others."""
        if time.monotonic() >= self._next_look:
            self._look()
            self._next_look = time.monotonic() + LOOK_SECONDS
        readable = {descriptor for descriptor, _ in self._poll.poll(seconds * 1000)}
        self._bury({pid for pid, w in self._watched.items() if w.ended(readable)})

    def problem(self) -> str | None:
        """What keeps the run from going on, though its main program is still there."""
        for watched in self._watched.values():
            if watched.stopped_looks >= STOPPED_LOOKS and watched.title != REPLACED:
                seconds = STOPPED_LOOKS * LOOK_SECONDS
                return f"{watched.shown} has been stopped (SIGSTOP) for {seconds:.0f} s"
        if self.death and time.monotonic() - self.death.seconds > DEATH_SECONDS:
            return f"{self.death.shown}, and the run did not end within {DEATH_SECONDS:.0f} s"
        return None

    def _look(self) -> None:
        present = set(psutil.pids())
        self._others &= present
        self._doubtful &= present
        for pid in sorted(present - self._others - self._watched.keys()):
            self._meet(pid)
        for watched in self._watched.values():
            with contextlib.suppress(psutil.Error, OSError):
                stopped = watched.process.status() == psutil.STATUS_STOPPED
                watched.stopped_looks = watched.stopped_looks + 1 if stopped else 0
                watched.title = title(watched.process.cmdline()) or watched.title

    def _meet(self, pid: int) -> None:
        try:
            process = psutil.Process(pid)
            if process.environ().get(MARKER) != self.marker:
                # While a process becomes another program its environment reads as empty, or torn.
                (self._others if pid in self._doubtful else self._doubtful).add(pid)
                return
            watched = Watched(process, process.ppid(), title(process.cmdline()), _pidfd(pid))
        except psutil.NoSuchProcess:
            return
        except (psutil.Error, OSError):
            self._others.add(pid)
            return
        self._watched[pid] = watched
        if watched.descriptor >= 0:
            self._poll.register(watched.descriptor, select.POLLIN)

    def _bury(self, ended: set[int]) -> None:
        # Of those that ended together the ancestors come first: with a node its workers end.
        for pid in sorted(ended, key=lambda pid: self._watched[pid].parent in ended):
            watched = self._watched[pid]
            code = _exit_status(pid, watched.descriptor)
            if watched.descriptor >= 0:
                self._poll.unregister(watched.descriptor)
            watched.close()
            if self.death is None and watched.essential and code != 0:
                self.death = Death(f"{watched.shown} {_describe(code)}", time.monotonic())
                self._on_death()
        for pid in ended:
            del self._watched[pid]


def title(command: Sequence[str]) -> str:
    """A command line in one word: what Ray calls it, Python's module or script, or the program."""
    first = "".join(command[:1]).split()
    if not first or "::" in first[0]:
        return first[0] if first else ""
    program = Path(first[0]).name
    if not program.startswith("python"):
        return program
    if "-m" in command[1:-1]:
        return command[command.index("-m", 1) + 1]
    scripts = [word for word in command if word.endswith(".py")]
    return Path(scripts[0]).name if scripts else program


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    known = {entry.value: entry.name for entry in signal.Signals}
    return known.get(number, f"signal {number}")


def _exit_status(pid: int, descriptor: int) -> int | None:
    """How another's child ended, as `wait` encodes it; None where the system does not tell.

    Linux tells until the parent has asked, and since 6.15 also afterwards.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state == "Z":
            return int(fields[_STAT_EXIT_CODE])
    buffer = bytearray(_PIDFD_INFO.size)
    _PIDFD_INFO.pack_into(buffer, 0, _PIDFD_INFO_EXIT, 0)
    try:
        fcntl.ioctl(descriptor, _PIDFD_GET_INFO, buffer)
    except (OSError, ValueError):
        return None
    mask, status = _PIDFD_INFO.unpack(buffer)
    return status if mask & _PIDFD_INFO_EXIT else None


def _describe(status: int | None) -> str:
    if status is None:
        return "died"
    if os.WIFSIGNALED(status):
        return f"was ended by {signal_name(os.WTERMSIG(status))}"
    return f"ended with exit code {os.waitstatus_to_exitcode(status)}"
