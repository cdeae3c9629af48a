"""What Ray records of the actors and nodes of this run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ray

# The GCS keeps this table with or without a dashboard; the public state API asks the dashboard.
from ray._private.state import actors as actor_table
from ray.core.generated import common_pb2

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


class RayRecord:
    """Reads Ray's tables of this process's job; Ray must be initialised in it."""

    def __init__(self) -> None:
        self._nodes: dict[str, str] = {}

    def deaths(self) -> list[str]:
        """The ends of actors and nodes that nothing in the run asked for.

        Each has role, name, process and machine, and what Ray says. Nodes come first, since
        their actors end with them; then actors by time.
        """
        return [*self._dead_nodes(), *(text for _, text in sorted(self._dead_actors()))]

    def _dead_nodes(self) -> Iterator[str]:
        for node in ray.nodes():
            identity, address = node["NodeID"], node["NodeManagerAddress"]
            if node["Alive"]:
                self._nodes[identity] = address
            elif identity in self._nodes:
                yield f"the Ray node {address} died (its raylet does not answer)"

    @staticmethod
    def _dead_actors() -> Iterator[tuple[int, str]]:
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        table: Mapping[str, Any] = actor_table(job_id=job, actor_state_name="DEAD")
        for actor in table.values():
            cause = actor["DeathCause"]
            kind = cause.WhichOneof("context") or ""
            context: Any = getattr(cause, kind, None)
            lost = kind == "actor_died_error_context" and context.reason in LOST
            if lost or kind == "oom_context":
                yield actor["EndTime"], f"{_shown(actor)} died ({_detail(context)})"


def _shown(actor: Mapping[str, Any]) -> str:
    # Ray names a class as Python qualifies it, such as `make.<locals>.WorkerDict`.
    name, address = actor["ActorClassName"].rpartition(".")[2], actor["Address"]["IPAddress"]
    place = f"{name}, process {actor['Pid']} on {address}"
    return f"the {ROLES[name]} ({place})" if name in ROLES else f"the actor {place}"


def _detail(context: Any) -> str:
    text = " ".join(context.error_message.split())
    return text if len(text) <= DETAIL_CHARACTERS else f"{text[:DETAIL_CHARACTERS]}..."
