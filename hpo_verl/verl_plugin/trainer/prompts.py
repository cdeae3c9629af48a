"""The part of a trainer that decides which prompts come next, and how many responses each gets.

verl 0.9.1 has no setting for a sampler of prompts, so the trainer builds its own data loader.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch.utils.data import Sampler, StackDataset

from hpo_verl.algorithms.base import Rollout
from hpo_verl.core.allocation import allocate
from hpo_verl.verl_plugin.curriculum import StagedSampler, curriculum_settings, difficulty
from hpo_verl.verl_plugin.knapsack import COLUMN, knapsack_settings

ROW = "prompt_row"
"""Column that tells a prompt's row in the training set."""


class PromptRows:
    """Mixed into a trainer of verl: does nothing unless a part above it names a sampler."""

    config: Any
    train_dataset: Any
    train_dataloader: Any
    _rows: dict[Hashable, int]

    def _prompt_sampler(self) -> Sampler[int] | None:
        """Sampler of rows in the place of verl's; None for verl's loader as it is."""
        return None

    def _init_dataloader(self) -> None:
        super()._init_dataloader()  # type: ignore[misc]
        self._rows = {}
        sampler = self._prompt_sampler()
        if sampler is None:
            return
        from torchdata.stateful_dataloader import StatefulDataLoader
        from verl.utils.dataset.rl_dataset import collate_fn

        data = self.config.data
        numbers: Any = range(len(self.train_dataset))

        def collate(items: list[tuple[dict[str, Any], int]]) -> dict[str, Any]:
            return collate_fn([{**item, ROW: row} for item, row in items])

        self.train_dataloader = StatefulDataLoader(
            dataset=StackDataset(self.train_dataset, numbers),
            batch_size=data.get("gen_batch_size", None) or data.train_batch_size,
            # A worker would read ahead, with a sampler's state of earlier steps.
            num_workers=0,
            drop_last=True,
            collate_fn=collate,
            sampler=sampler,
        )

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        if ROW in batch:
            self._rows.update(zip(batch["uid"], batch[ROW], strict=True))
            batch.pop(ROW)
        return super()._submit_batch_to_rollout(batch)  # type: ignore[misc]

    def prepare_step(self) -> dict[str, Any]:
        """Forget the rows of the step before, and submit the step's prompts."""
        self._rows.clear()
        return super().prepare_step()  # type: ignore[misc]

    def note_rewards(self, part: Rollout, labels: list[Hashable]) -> dict[str, float]:
        """Take in the responses of a step, by uid; returns what is logged as `hpo/<name>`."""
        return {}


class Curriculum(PromptRows):
    """Draws prompts stage by stage, where `data.curriculum.by` is set; see `curriculum`."""

    global_steps: int
    total_training_steps: int
    _stages: StagedSampler | None = None

    def _prompt_sampler(self) -> Sampler[int] | None:
        settings, data = curriculum_settings(self.config), self.config.data
        if settings.by is None:
            return super()._prompt_sampler()
        by = settings.by
        # The rows of verl's own data set without what it does to each.
        rows = getattr(self.train_dataset, "dataframe", self.train_dataset)
        difficulties = [
            difficulty(row, by, f"row {number} of the training set")
            for number, row in zip(range(1, len(rows) + 1), rows, strict=False)
        ]
        self._stages = StagedSampler(
            difficulties,
            self.total_training_steps,
            data.train_batch_size,
            settings,
            data.get("seed") or 0,
        )
        return self._stages

    def prepare_step(self) -> dict[str, Any]:
        """Add the stage of the step, from 1, to its metrics."""
        metrics = super().prepare_step()
        if self._stages is not None:
            metrics["hpo/curriculum_stage"] = 1 + self._stages.stage(self.global_steps)
        return metrics


class Knapsack(PromptRows):
    """Deals a step's responses to its prompts by value, where this is enabled; see `knapsack`.

    `success_rates` are those of the prompts that were seen, by their row; saved in checkpoints.
    """

    success_rates: dict[str, float]
    _dealt: tuple[int, ...] = ()

    def __init__(self, config: Any) -> None:
        self.success_rates = {}
        super().__init__(config)  # type: ignore[call-arg]

    def _prompt_sampler(self) -> Sampler[int] | None:
        sampler = super()._prompt_sampler()
        if sampler is None and knapsack_settings(self.config).enable:
            from verl.trainer.ppo.utils import create_rl_sampler

            return create_rl_sampler(self.config.data, self.train_dataset)
        return sampler

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        if (settings := knapsack_settings(self.config)).enable:
            from verl.utils import tensordict_utils as tu

            rates = [self.success_rates.get(str(row)) for row in batch[ROW]]
            n = self.config.actor_rollout_ref.rollout.n
            self._dealt = allocate(rates, n, settings.low, settings.high)
            tu.assign_non_tensor_stack(batch, COLUMN, list(self._dealt))
        return super()._submit_batch_to_rollout(batch)

    def note_rewards(self, part: Rollout, labels: list[Hashable]) -> dict[str, float]:
        """Keep the share of every prompt's responses with a reward above 0."""
        if not self._dealt:
            return super().note_rewards(part, labels)
        known = sum(str(row) in self.success_rates for row in self._rows.values())
        right = (part.rewards if part.scores is None else part.scores) > 0
        found: dict[Hashable, list[bool]] = {}
        for row in part.live.nonzero().squeeze(-1).tolist():
            found.setdefault(labels[row], []).append(bool(right[row]))
        for label, one in found.items():
            self.success_rates[str(self._rows[label])] = sum(one) / len(one)
        return {
            "knapsack_most": float(max(self._dealt)),
            "knapsack_known_fraction": known / len(self._rows),
        }
