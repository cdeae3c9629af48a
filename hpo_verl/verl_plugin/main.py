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
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

# The GCS keeps this table with or without a dashboard; the public state API asks the dashboard.
from ray._private.state import actors as actor_table
from ray.core.generated import common_pb2
from ray.exceptions import RayActorError, RayError

from hpo_verl.runs.process import FAILURE_VARIABLE

ROLES = {
    "TaskRunnerV1": "trainer",
    "WorkerDict": "actor worker",
    "HFServer": "rollout server",
    "vLLMHttpServer": "rollout server",
    "AgentLoopWorkerTQ": "agent-loop worker",
    "CoalescingAgentLoopWorker": "agent-loop worker",
    "RewardLoopWorker": "reward worker",
    "TransferQueueController": "TransferQueue controller",
    "SimpleStorageUnit": "TransferQueue storage",
}
# The other reasons are a program's own doing, or follow from the death of an owner.
_CONTEXT: Any = common_pb2.ActorDiedErrorContext  # pyright: ignore[reportAttributeAccessIssue]
LOST = (_CONTEXT.WORKER_DIED, _CONTEXT.NODE_DIED)
DETAIL_CHARACTERS = 300
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
    """Ends the run if an actor or a node of it dies, as Ray records it, and verl does not end."""

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        self._lock = threading.Lock()
        self._nodes: dict[str, str] = {}
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
        """The first end of an actor or a node that nothing in the run asked for; None without one.

        It has role, name, process and machine, and what Ray says.
        """
        with self._lock:
            try:
                if self._first is None and ray.is_initialized():
                    # A node's actors end with it.
                    self._first = self._dead_node() or _dead_actor()
            except Exception as error:
                # Ray's own client ends this process if its server stays away.
                print(f"WARN: Ray's record cannot be read: {one_line(error)}", flush=True)
        return self._first

    def _dead_node(self) -> str | None:
        for node in ray.nodes():
            identity, address = node["NodeID"], node["NodeManagerAddress"]
            if node["Alive"]:
                self._nodes[identity] = address
            elif identity in self._nodes:
                return f"the Ray node {address} died (its raylet does not answer)"
        return None


def _dead_actor() -> str | None:
    """The actor of this process's job that was lost first."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    table: Mapping[str, Any] = actor_table(job_id=job, actor_state_name="DEAD")
    for actor in sorted(table.values(), key=lambda actor: actor["EndTime"]):
        cause = actor["DeathCause"]
        kind = cause.WhichOneof("context") or ""
        context: Any = getattr(cause, kind, None)
        lost = kind == "actor_died_error_context" and context.reason in LOST
        if not lost and kind != "oom_context":
            continue
        # Ray names a class as Python qualifies it, such as `make.<locals>.WorkerDict`.
        name, address = actor["ActorClassName"].rpartition(".")[2], actor["Address"]["IPAddress"]
        place = f"{name}, process {actor['Pid']} on {address}"
        who = f"{ROLES[name]} ({place})" if name in ROLES else f"actor {place}"
        detail = textwrap.shorten(context.error_message, DETAIL_CHARACTERS, placeholder="...")
        return f"the {who} died ({detail})"
    return None


def reason_of(error: BaseException, watch: Watch) -> str:
    """Why verl failed: the first death, if any, and the exception unless it is about that death."""
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
