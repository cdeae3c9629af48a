"""Sends the actor only what it reads.

verl hands a batch to its workers by name and each worker fetches all columns,
the data set's texts included, for every sample by itself. For short responses
that costs as much as the update. TransferQueue's metadata has a list of columns
to fetch; here it is filled in.
"""

from __future__ import annotations

from typing import Any

# Columns that only the driver reads.
NOT_FOR_THE_ACTOR = frozenset(
    {
        "data_source",
        "extra_fields",
        "num_turns",
        "reward_model",
        "rm_scores",
        "rollout_log_probs",
        "token_level_rewards",
        "uid",
    }
)


class LeanTransfer:
    """Mixed into a trainer of verl: the actor's passes fetch fewer columns."""

    _columns: dict[str, list[str]]

    def _fetch_lean(self, phase: str, batch: Any) -> Any:
        """Fill in `batch.fields`; what columns there are is looked up once a phase."""
        from verl.utils.transferqueue_utils import kv_batch_meta2batch_meta

        cache = self.__dict__.setdefault("_columns", {})
        if phase not in cache:
            names = kv_batch_meta2batch_meta(batch).field_names
            cache[phase] = [name for name in names if name not in NOT_FOR_THE_ACTOR]
        batch.fields = cache[phase]
        return batch

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_old_log_prob(  # type: ignore[misc]
            self._fetch_lean("old_log_prob", batch), metrics
        )
        batch.fields = None
        return batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(  # type: ignore[misc]
            self._fetch_lean("update_actor", batch), metrics
        )
        batch.fields = None
        return batch
