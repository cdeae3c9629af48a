"""A curriculum over the training set, after CRAFT-GUI (arXiv 2508.11360): easy prompts first.

    stage of step t of T = floor((t - 1) S / T),   of S stages
    rows of stage s      = those from rank floor(s R / S) up to floor((s + 1) R / S), of R rows

Rows are ranked by a number that each of them has in `extra_info`, such as `difficulty`, how many
solutions a Countdown puzzle has (the more, the easier: `descending`).

From the paper: stages from easy to hard, one after the other, by a number known beforehand (there
the steps of a task on a screen). Its rewards for screens are left out. Decided here, since the
paper leaves it open: stages of equally many rows and steps; equal numbers in the order of the file;
within a stage rows come in a random order, each once before any comes again; a stage has none of
the rows before it (`cumulative` keeps them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from hpo_verl.core.settings import parse_settings, require_flag, require_integer
from hpo_verl.errors import ConfigError, DataError

SECTION = "data.curriculum"


@dataclass(frozen=True)
class CurriculumSettings:
    """The section `data.curriculum`.

    Attributes:
        by: Name of a number in `extra_info` of every row; None for verl's order.
        descending: Whether the largest numbers come first.
        stages: How many stages, at least 1.
        cumulative: Whether a stage has the rows of the stages before it, too.
    """

    by: str | None = None
    descending: bool = False
    stages: int = 3
    cumulative: bool = False

    def __post_init__(self) -> None:
        if self.by is not None and (not isinstance(self.by, str) or not self.by):
            raise ConfigError(f"{SECTION}.by = {self.by!r}: must be a name in extra_info, or null")
        require_flag(f"{SECTION}.descending", self.descending)
        require_integer(f"{SECTION}.stages", self.stages, 1)
        require_flag(f"{SECTION}.cumulative", self.cumulative)


def curriculum_settings(config: Mapping[str, Any]) -> CurriculumSettings:
    """Read the section in verl's whole configuration; a bad value raises a ConfigError."""
    return parse_settings(CurriculumSettings, config["data"].get("curriculum"), SECTION)


def difficulty(row: Mapping[str, Any], by: str, where: str) -> float:
    """The number of a row by which it is ranked; without one, a DataError that says where."""
    value = (row.get("extra_info") or {}).get(by)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{SECTION}.by = {by!r}: {where}: extra_info.{by} = {value!r}, no number")
    return float(value)


class StagedSampler(Sampler[int]):
    """Draws rows stage by stage, whole steps of each; without end, since the last one goes on.

    Its order follows from the arguments alone, so that a run that goes on finds its place by the
    number of rows drawn, as torchdata does.

    Raises:
        ConfigError: There are more stages than steps or rows.
    """

    def __init__(
        self,
        difficulties: Sequence[float],
        steps: int,
        batch_size: int,
        settings: CurriculumSettings,
        seed: int,
    ) -> None:
        for number, what in ((steps, "steps of the run"), (len(difficulties), "rows")):
            if settings.stages > number:
                raise ConfigError(
                    f"{SECTION}.stages = {settings.stages}: must be at most the {number} {what}"
                )
        self.steps, self.batch_size, self.settings, self.seed = steps, batch_size, settings, seed
        self.ranked = sorted(
            range(len(difficulties)), key=difficulties.__getitem__, reverse=settings.descending
        )

    def __len__(self) -> int:
        return len(self.ranked)

    def stage(self, step: int) -> int:
        """Stage of a step, from 0; the first step is 1."""
        stages = self.settings.stages
        return min((step - 1) * stages // self.steps, stages - 1)

    def rows(self, stage: int) -> list[int]:
        """Rows of a stage, by rank."""
        size, stages = len(self.ranked), self.settings.stages
        start = 0 if self.settings.cumulative else stage * size // stages
        return self.ranked[start : (stage + 1) * size // stages]

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        drawn, stage, left = 0, -1, []
        while True:
            now = self.stage(drawn // self.batch_size + 1)
            if now != stage or not left:
                stage, rows = now, self.rows(now)
                left = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            yield left.pop()
            drawn += 1
