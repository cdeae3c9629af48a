"""What a trainer needs so that a run repeats.

verl names prompts by random ids and trains on responses in the order in which
they finished, so that mini-batches differ from run to run. Here names follow
from the step, and a batch is sorted by them before it is used.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from verl.utils import tensordict_utils as tu


def response_order(key: str) -> tuple[str, int, int]:
    """Sort key of TransferQueue's key `{uid}_{session}_{output}` of a response."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)


class RepeatableOrder:
    """Mixed into a trainer of verl: fixed names, fixed order, and how often to look.

    `trainer.v1.sampler.poll_interval` (seconds) sets how often the trainer looks
    for finished responses; verl's own default is 2.
    """

    config: DictConfig
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

    def _balance_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        order = sorted(range(len(batch.keys)), key=lambda row: response_order(batch.keys[row]))
        batch.reorder(order)
        ranks = self.config.trainer.nnodes * self.config.trainer.n_gpus_per_node
        if ranks == 1 and len(order) % self._get_required_batch_multiple(1) == 0:  # type: ignore[attr-defined]
            # Nothing to share out or to fill up, and verl's search takes 0.1 s.
            return batch
        return super()._balance_batch(batch, *args, **kwargs)  # type: ignore[misc]
