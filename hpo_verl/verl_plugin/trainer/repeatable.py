"""What a trainer needs so that a run repeats.

verl names prompts by random ids and trains on responses in the order in which
they finished, so that mini-batches differ from run to run; and it deals a whole
batch to the ranks before each cuts its share into mini-batches, so that they
differ with the number of ranks. Here names follow from the step, a batch is
sorted by them before it is used, and every mini-batch is dealt by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from verl.utils import tensordict_utils as tu
from verl.utils.seqlen_balancing import (
    calculate_workload,
    get_seqlen_balanced_partitions,
    log_seqlen_unbalance,
)


def response_order(key: str) -> tuple[str, int, int]:
    """Sort key of TransferQueue's key `{uid}_{session}_{output}` of a response."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)


def deal_mini_batches(lengths: Sequence[int], mini_batch_size: int, ranks: int) -> list[list[int]]:
    """Deal the rows of every mini-batch to the ranks, about the same work to each.

    Args:
        lengths: tokens of each row, in the order in which mini-batches are cut.
        mini_batch_size: rows of a mini-batch over all ranks.
        ranks: data-parallel ranks; they divide the mini-batch and the number of rows.

    Returns:
        For each rank, its rows: its share of the first mini-batch, of the second, ...
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    workloads = calculate_workload(torch.tensor(lengths, dtype=torch.int64))
    for start in range(0, len(lengths), mini_batch_size):
        parts: Any = get_seqlen_balanced_partitions(
            workloads[start : start + mini_batch_size].tolist(), ranks, equal_size=True
        )
        for share, part in zip(shares, parts, strict=True):
            share += [start + row for row in part]
    return shares


class RepeatableOrder:
    """Mixed into a trainer of verl: fixed names, fixed order, and how often to look.

    A mini-batch holds the same responses however many ranks there are.

    `trainer.v1.sampler.poll_interval` (seconds) sets how often the trainer looks
    for finished responses; verl's own default is 2.
    """

    config: DictConfig
    actor_rollout_wg: Any
    global_steps: int
    _named_in_step: tuple[int, int] = (-1, 0)

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()  # type: ignore[misc]
        interval = self.config.trainer.v1.sampler.get("poll_interval")
        if interval is not None:
            buffer.poll_interval = float(interval)
        return buffer

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        step, named = self._named_in_step
        if step != self.global_steps:
            named = 0
        uids = [f"{self.global_steps:08d}-{named + row:08d}" for row in range(len(batch))]
        self._named_in_step = (self.global_steps, named + len(batch))
        tu.assign_non_tensor_stack(batch, "uid", uids)
        return super()._submit_batch_to_rollout(batch)  # type: ignore[misc]

    def _balance_batch(
        self,
        batch: Any,
        metrics: dict[str, Any],
        logging_prefix: str = "global_seqlen",
        keep_minibatch: bool = True,
    ) -> Any:
        _sort_by_name(batch)
        cluster = self.config.trainer
        multiple = self._get_required_batch_multiple(1)  # type: ignore[attr-defined]
        if cluster.nnodes * cluster.n_gpus_per_node == 1 and len(batch.keys) % multiple == 0:
            # Nothing to deal or to fill up, and verl's search for it takes 0.1 s.
            return batch
        # The parent adds padding rows, whose names come after all others.
        batch = super()._balance_batch(batch, metrics, logging_prefix)  # type: ignore[misc]
        _sort_by_name(batch)
        actor = self.config.actor_rollout_ref
        lengths = [tag["seq_len"] for tag in batch.tags]
        shares = deal_mini_batches(
            lengths,
            mini_batch_size=actor.actor.ppo_mini_batch_size * actor.rollout.n,
            ranks=max(self.actor_rollout_wg._dispatch_info["actor"]) + 1,
        )
        batch.reorder([row for share in shares for row in share])
        metrics.update(log_seqlen_unbalance(lengths, shares, logging_prefix))
        return batch


def _sort_by_name(batch: Any) -> None:
    batch.reorder(sorted(range(len(batch.keys)), key=lambda row: response_order(batch.keys[row])))
