"""The part of a trainer that SPO needs: prompts by weight, values, and updates of both.

verl 0.9.1 has no setting for a sampler of prompts (the curriculum sampler of
earlier versions is gone). A registered trainer may build its own data loader,
and does so here; the loader's state is what verl itself saves and restores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from hpo_verl.algorithms.spo import SPOSettings, ValueTracker, mean_drift
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin.advantages import response_rewards
from hpo_verl.verl_plugin.estimator_inputs import lend
from hpo_verl.verl_plugin.spo import (
    ESTIMATOR,
    ROW,
    NumberedRows,
    PrioritizedSampler,
    read_initial_rewards,
    spo_settings,
)
from hpo_verl.verl_plugin.trainer.last_responses import LastResponse, gather, scoring_fields

PARTITION = "spo_last_responses"
"""Where in TransferQueue last responses lie while they are scored."""


class SingleStreamTrainer:
    """Mixed into a trainer of verl: does nothing unless `spo` is selected."""

    config: Any
    train_dataset: Any
    train_dataloader: Any
    actor_rollout_wg: Any
    _sampler: PrioritizedSampler
    _rows: dict[str, int]

    def _selected(self) -> bool:
        return self.config.algorithm.adv_estimator == ESTIMATOR

    def _init_dataloader(self) -> None:
        super()._init_dataloader()  # type: ignore[misc]
        if not self._selected():
            return
        from torchdata.stateful_dataloader import StatefulDataLoader
        from verl.utils.dataset.rl_dataset import collate_fn

        data = self.config.data
        settings = spo_settings(self.config.algorithm)
        tracker = ValueTracker(len(self.train_dataset), settings, read_initial_rewards(settings))
        self._sampler = PrioritizedSampler(tracker, data.train_batch_size, data.get("seed"))
        self._rows = {}
        self.train_dataloader = StatefulDataLoader(
            dataset=NumberedRows(self.train_dataset),
            batch_size=data.get("gen_batch_size", None) or data.train_batch_size,
            # A worker would read ahead, with the weights of earlier steps.
            num_workers=0,
            drop_last=True,
            collate_fn=collate_fn,
            sampler=self._sampler,
        )

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        if self._selected():
            self._rows.update(zip(batch["uid"], batch[ROW], strict=True))
            batch.pop(ROW)
        return super()._submit_batch_to_rollout(batch)  # type: ignore[misc]

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        compute = super()._compute_advantage  # type: ignore[misc]
        if not self._selected():
            return compute(batch, metrics)
        import transfer_queue as tq

        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["uid", "response_mask", "rm_scores"],
        )
        uids = data.pop("uid").tolist()
        data = data.to_padded_tensor()
        rewards, live = response_rewards(data["rm_scores"], data["response_mask"])
        values = self._sampler.tracker.values()
        with lend(
            values={uid: float(values[self._rows[uid]]) for uid in uids if uid in self._rows}
        ):
            batch = compute(batch, metrics)

        at = live.nonzero().squeeze(-1).tolist()
        rows = [self._rows[uids[position]] for position in at]
        if len(set(rows)) != len(rows):
            twice = next(row for row in rows if rows.count(row) > 1)
            raise DataError(
                f"spo: row {twice} of the training set has {rows.count(twice)} responses; an "
                "agent loop must give one per prompt"
            )
        self._track(batch, at, rows, rewards[at], values[rows], metrics)
        self._rows.clear()
        return batch

    def _track(
        self,
        batch: Any,
        at: list[int],
        rows: list[int],
        rewards: torch.Tensor,
        values: torch.Tensor,
        metrics: dict[str, Any],
    ) -> None:
        """Update the tracker with the responses at positions `at`, of prompts `rows`."""
        settings: SPOSettings = self._sampler.tracker.settings
        last = self._sampler.last
        drift = torch.zeros(len(rows), dtype=torch.float64)
        seen = [i for i, row in enumerate(rows) if row in last]
        if settings.adaptive and rows:
            if seen:
                drift[seen] = self._drift([last[rows[i]] for i in seen], len(batch.keys))
            last.update(zip(rows, self._responses([batch.keys[i] for i in at], batch), strict=True))
        rho = settings.forgetting(drift)
        self._sampler.tracker.update(torch.tensor(rows, dtype=torch.int64), rewards, rho)
        count = max(len(rows), 1)
        metrics["hpo/spo_value"] = float(values.sum()) / count
        metrics["hpo/spo_forgetting"] = float(rho.sum()) / count
        if settings.adaptive:
            metrics["hpo/spo_drift"] = float(drift.sum()) / count
            metrics["hpo/spo_revisited_fraction"] = len(seen) / count

    def _responses(self, keys: list[str], batch: Any) -> list[LastResponse]:
        import transfer_queue as tq

        data = tq.kv_batch_get(
            keys=keys,
            partition_id=batch.partition_id,
            select_fields=["prompts", "responses", "response_mask", "old_log_probs"],
        )
        return gather(
            data["prompts"], data["responses"], data["response_mask"], data["old_log_probs"]
        )

    def _drift(self, last: list[LastResponse], rows: int) -> torch.Tensor:
        """Score last responses with the policy as it is, and compare.

        Args:
            last: The responses.
            rows: How many rows to score, filled up with copies of the shortest.

        Returns:
            D of every response, nats, `[len(last)]`.
        """
        import transfer_queue as tq
        from tensordict import TensorDict
        from transfer_queue import KVBatchMeta
        from verl.workers.utils.padding import response_from_nested

        # As many rows as the batch has: verl has split those over ranks and micro-batches.
        filled = last + [min(last, key=LastResponse.length)] * (rows - len(last))
        keys = [f"last_{i}" for i in range(len(filled))]
        fields = scoring_fields(filled)
        tags: list[dict[str, Any]] = [{} for _ in keys]
        tq.kv_batch_put(
            keys=keys,
            partition_id=PARTITION,
            fields=TensorDict(fields, batch_size=len(filled)),  # type: ignore[arg-type]
            tags=tags,
        )
        try:
            extra = {
                "calculate_entropy": False,
                "compute_loss": False,
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            }
            self.actor_rollout_wg.compute_log_prob(
                KVBatchMeta(
                    keys=keys, tags=tags, partition_id=PARTITION, fields=[*fields], extra_info=extra
                )
            )
            data = tq.kv_batch_get(
                keys=keys, partition_id=PARTITION, select_fields=["log_probs", "response_mask"]
            )
        finally:
            tq.kv_clear(keys=keys, partition_id=PARTITION)
        scored = response_from_nested(data["log_probs"], data["response_mask"])
        return mean_drift(
            scored.to_padded_tensor(0.0)[: len(last)],
            pad_sequence([one.log_prob for one in last], batch_first=True),
            pad_sequence([one.mask for one in last], batch_first=True),
        )
