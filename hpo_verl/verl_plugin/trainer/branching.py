"""The part of a trainer that logs how sessions branched; see `verl_plugin.branching`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpo_verl.verl_plugin.branching import RECORD, branches


def branching_metrics(extra_fields: Sequence[Any]) -> dict[str, float]:
    """Share of the sessions that are branches, and the mean H_t - H_root of their own turns.

    verl's padding rows have no record. Without a tool's reply the change is 0.
    """
    records = [one[RECORD] for one in extra_fields if isinstance(one, dict) and RECORD in one]
    changes = [change for record in records for change in record["changes"]]
    return {
        "hpo/branched_session_fraction": sum(record["branched"] for record in records)
        / max(len(records), 1),
        "hpo/tool_entropy_change": sum(changes) / max(len(changes), 1),
    }


class Branching:
    """Mixed into a trainer of verl: does nothing unless sessions branch."""

    config: Any

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if branches(self.config.actor_rollout_ref.rollout):
            import transfer_queue as tq

            where: dict[str, Any] = {"keys": batch.keys, "partition_id": batch.partition_id}
            data: Any = tq.kv_batch_get(**where, select_fields=["extra_fields"])
            metrics.update(branching_metrics(data.pop("extra_fields").tolist()))
        return super()._compute_advantage(batch, metrics)  # type: ignore[misc]
