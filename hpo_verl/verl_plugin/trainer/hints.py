"""The part of a trainer that asks groups again that fail whole; see `verl_plugin.hints`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transfer_queue as tq
from verl.utils import tensordict_utils as tu

from hpo_verl.verl_plugin.hints import Messages, hint_settings, hinted, reference
from hpo_verl.verl_plugin.prompt_tokens import prompt_counter


def best_rewards(batch: Any) -> dict[str, float]:
    """Largest reward of each group of a batch in TransferQueue, by its uid, in their order."""
    data: Any = tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"]
    )
    rewards = data["rm_scores"].to_padded_tensor(0.0).sum(dim=-1).tolist()
    best: dict[str, float] = {}
    for key, reward in zip(batch.keys, rewards, strict=True):
        uid = key.rsplit("_", 2)[0]
        best[uid] = max(best.get(uid, reward), reward)
    return dict(sorted(best.items()))


class Hints:
    """Mixed into a trainer of verl: does nothing unless hints are enabled.

    verl's replay buffer waits for a step's groups. Here groups that failed are submitted again, by
    the same names, before the step goes on, and waited for in the same way.
    """

    config: Any
    tokenizer: Any
    _asked: Any = None

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()  # type: ignore[misc]
        if hint_settings(self.config).enable:
            sample = buffer.sample

            def sample_with_hints(global_steps: int, partition_id: str, batch_size: int) -> Any:
                found = sample(
                    global_steps=global_steps, partition_id=partition_id, batch_size=batch_size
                )
                if partition_id != "train":
                    return found
                return self._with_hints(sample, global_steps, *found)

            buffer.sample = sample_with_hints
        return buffer

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        self._asked = batch
        return super()._submit_batch_to_rollout(batch)  # type: ignore[misc]

    def _with_hints(
        self, sample: Callable[..., Any], step: int, batch: Any, metrics: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The batch with the groups that failed asked again, and the metrics."""
        settings, prompts = hint_settings(self.config), self._asked
        rows = {uid: row for row, uid in enumerate(prompts["uid"])}
        plain, infos = list(prompts["raw_prompt"]), list(prompts["extra_info"])
        count = prompt_counter(self.config, self.tokenizer)
        best, with_hint, too_long = best_rewards(batch), set(), set()
        at_first = [uid for uid, reward in best.items() if reward <= 0]
        for share in settings.shares if step > settings.after_step else ():
            again: dict[str, Messages] = {}
            for uid in (uid for uid in at_first if best.get(uid, 0.0) <= 0):
                solution = reference(infos[rows[uid]], settings.by)
                messages = hinted(list(plain[rows[uid]]), solution, share, settings.text)
                if messages is None:
                    continue
                if count(messages) > self.config.data.max_prompt_length:
                    too_long.add(uid)
                    continue
                again[uid] = messages
            if not again:
                continue
            batch = self._ask_again(sample, step, batch, rows, again)
            with_hint.update(again)
            best = best_rewards(batch)
        helped = sum(best.get(uid, 0.0) > 0 for uid in at_first)
        metrics["hpo/failed_group_fraction"] = len(at_first) / len(rows)
        metrics["hpo/hinted_group_fraction"] = len(with_hint) / len(rows)
        metrics["hpo/hint_success_fraction"] = helped / max(len(at_first), 1)
        metrics["hpo/hint_too_long_fraction"] = len(too_long) / len(rows)
        return batch, metrics

    def _ask_again(
        self,
        sample: Callable[..., Any],
        step: int,
        batch: Any,
        rows: dict[str, int],
        again: dict[str, Messages],
    ) -> Any:
        """Put responses to other prompts in the place of groups'."""
        old = [key for key in batch.keys if key.rsplit("_", 2)[0] in again]
        tq.kv_clear(keys=old, partition_id=batch.partition_id)
        prompts = tu.index_select_tensor_dict(self._asked, [rows[uid] for uid in again])
        tu.assign_non_tensor_stack(prompts, "raw_prompt", list(again.values()))
        super()._submit_batch_to_rollout(prompts)  # type: ignore[misc]
        new, _ = sample(global_steps=step, partition_id=batch.partition_id, batch_size=len(again))
        gone = set(old)
        kept = [
            (key, tag) for key, tag in zip(batch.keys, batch.tags, strict=True) if key not in gone
        ]
        keys, tags = zip(*kept, *zip(new.keys, new.tags, strict=True), strict=True)
        return tq.KVBatchMeta(list(keys), list(tags), batch.partition_id)
