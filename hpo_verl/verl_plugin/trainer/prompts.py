"""The part of a trainer that decides which prompts come next, and knows their rows.

verl 0.9.1 has no setting for a sampler of prompts, so the trainer builds its own data loader.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch.utils.data import Sampler, StackDataset

from hpo_verl.verl_plugin.curriculum import StagedSampler, curriculum_settings, difficulty

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
        metrics = super().prepare_step()  # type: ignore[misc]
        if self._stages is not None:
            metrics["hpo/curriculum_stage"] = 1 + self._stages.stage(self.global_steps)
        return metrics
