"""The part of a trainer for estimators with a history of prompts: draws, values and updates.

verl saves the state of the data loader in `data.pt` of every checkpoint, and with it the history
and the last response of every prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from hpo_verl.algorithms.base import PromptHistory
from hpo_verl.algorithms.registry import ESTIMATORS
from hpo_verl.core.ratios import mean_drift
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin.advantages import Estimate, read_settings
from hpo_verl.verl_plugin.trainer.prompts import PromptRows

PARTITION = "last_responses"
"""Where in TransferQueue last responses lie while they are scored."""

RESPONSE_FIELDS = {
    "prompts": torch.int32,
    "responses": torch.int32,
    "response_mask": torch.bool,
    "old_log_probs": torch.float32,
}
"""Fields of a step that a last response is made of, and the types in which they are kept."""


class LastResponse(NamedTuple):
    """What scoring the last response to a prompt again takes: nine bytes a token.

    `mask` says which response tokens the policy wrote; `log_prob` is under the policy that gave the
    response, nats.
    """

    prompt: torch.Tensor
    response: torch.Tensor
    mask: torch.Tensor
    log_prob: torch.Tensor

    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


def end_to_end(last: Mapping[int, LastResponse]) -> dict[str, Any]:
    """Last responses for a checkpoint: joined, since many small tensors take long to write."""
    columns = list(zip(*last.values(), strict=True))
    return {
        "rows": list(last),
        "lengths": [[len(part) for part in column] for column in columns],
        "columns": [torch.cat(column) for column in columns],
    }


def taken_apart(state: Mapping[str, Any]) -> dict[int, LastResponse]:
    """Last responses by row from what `end_to_end` made of them."""
    columns = [
        column.split(lengths)
        for column, lengths in zip(state["columns"], state["lengths"], strict=True)
    ]
    return {
        # A part is a view of the whole column; a copy lets go of it.
        row: LastResponse(*(part.clone() for part in parts))
        for row, *parts in zip(state["rows"], *columns, strict=True)
    }


def scoring_fields(last: list[LastResponse]) -> dict[str, torch.Tensor]:
    """What verl's actor reads to give log-probabilities: nested tensors by verl's names."""

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([row.long() for row in rows], layout=torch.jagged)

    mask = nested([one.mask for one in last])
    return {
        "prompts": nested([one.prompt for one in last]),
        "responses": nested([one.response for one in last]),
        "input_ids": nested([torch.cat([one.prompt, one.response]) for one in last]),
        "position_ids": nested([torch.arange(one.length()) for one in last]),
        "response_mask": mask,
        "loss_mask": mask,
    }


class HistorySampler(Sampler[int]):
    """Draws prompts as their history says, without end.

    A batch of different prompts is drawn when its first one is asked for, from the history of that
    moment; the loader must not read ahead, or it would use an old one. `last` holds the last
    response of every prompt by its row. Without a seed, the system's is used.
    """

    def __init__(self, history: PromptHistory, batch_size: int, seed: int | None) -> None:
        self.history = history
        self.batch_size = batch_size
        self.last: dict[int, LastResponse] = {}
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self._drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.history)

    def __iter__(self) -> Iterator[int]:
        while True:
            if not self._drawn:
                self._drawn = self.history.draw(self.batch_size, self.generator)
            yield self._drawn.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draws and updates depend on."""
        return {
            "tracker": self.history.state_dict(),
            "last": end_to_end(self.last),
            "generator": self.generator.get_state(),
            "drawn": list(self._drawn),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; one of another number of prompts raises a DataError."""
        self.history.load_state_dict(state["tracker"])
        self.last = taken_apart(state["last"])
        self.generator.set_state(state["generator"])
        self._drawn = list(state["drawn"])


class PromptHistoryTrainer(PromptRows):
    """Mixed into a trainer of verl: does nothing unless the estimator has a history."""

    actor_rollout_wg: Any
    _sampler: HistorySampler

    def _prompt_sampler(self) -> Sampler[int] | None:
        estimator = ESTIMATORS.get(str(self.config.algorithm.adv_estimator))
        if estimator is None or estimator.history is None:
            return super()._prompt_sampler()
        settings = read_settings(estimator, self.config.algorithm)
        history, data = estimator.history(len(self.train_dataset), settings), self.config.data
        self._sampler = HistorySampler(history, data.train_batch_size, data.get("seed"))
        return self._sampler

    def prompt_values(self) -> dict[Hashable, float]:
        """Value of every prompt that was drawn for this step, by its uid."""
        values = self._sampler.history.values()
        return {uid: float(values[row]) for uid, row in self._rows.items()}

    def history_fields(self) -> tuple[str, ...]:
        """Fields of the step that `learn_from` reads."""
        return tuple(RESPONSE_FIELDS) if self._sampler.history.measures_drift else ()

    def learn_from(self, estimate: Estimate, data: Any) -> dict[str, float]:
        """Update the history with the step's responses; returns what is logged as `hpo/<name>`.

        Several responses of one prompt raise a DataError.
        """
        at = estimate.part.live.nonzero().squeeze(-1).tolist()
        rows = [self._rows[estimate.labels[position]] for position in at]
        if len(set(rows)) != len(rows):
            twice = next(row for row in rows if rows.count(row) > 1)
            name = self.config.algorithm.adv_estimator
            raise DataError(
                f"{name}: row {twice} of the training set has {rows.count(twice)} responses; an "
                "agent loop must give one per prompt"
            )
        history, last = self._sampler.history, self._sampler.last
        drift = torch.zeros(len(rows), dtype=torch.float64)
        seen = [i for i, row in enumerate(rows) if row in last]
        if history.measures_drift and rows:
            if seen:
                drift[seen] = self._drift([last[rows[i]] for i in seen], len(estimate.labels))
            columns = {name: data[name].unbind() for name in RESPONSE_FIELDS}
            for row, i in zip(rows, at, strict=True):
                # Copies: a view would keep the whole step's column.
                parts = [
                    columns[name][i].to(kind, copy=True) for name, kind in RESPONSE_FIELDS.items()
                ]
                last[row] = LastResponse(*parts)
        rewards = estimate.part.rewards[at]
        self._rows.clear()
        return history.learn(torch.tensor(rows, dtype=torch.int64), rewards, drift, len(seen))

    def _drift(self, last: list[LastResponse], rows: int) -> torch.Tensor:
        """Mean |change of log-probability| of last responses, scored by the policy as it is, nats.

        Copies of the shortest fill them up to the number of rows.
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
