"""Reads finished runs and groups those that differ by their seed alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from omegaconf import DictConfig, OmegaConf

from hpo_verl.config.settings import leaves
from hpo_verl.errors import DataError
from hpo_verl.runs.metrics import MetricsFile

FILES = ("summary.json", "metrics.jsonl", "config.yaml")
NUMBERS = ("steps", "seed", "success_before", "success_after")
# What may differ between two runs of one experiment.
SEED_KEYS = frozenset({"seed", "data_loader_seed"})
PLACES = ("ray_kwargs", "trainer.default_local_dir", "trainer.logger")
SETTINGS_SHOWN = 3


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: Where it is.
        recipe: Task and model, or verl's experiment name.
        algorithm: Estimator and, where it adds something, loss.
        seed: Of data and sampling.
        steps: Training steps.
        before: Success on held-out prompts before training, fraction; None if not measured.
        after: The same after the last step.
        seconds_per_step: Median of verl's `timing_s/step`.
        validations: Steps and success rates (fraction) over the run.
        settings: Dotted key -> value of the configuration without seeds and places.
    """

    folder: Path
    recipe: str
    algorithm: str
    seed: int | None
    steps: int
    before: float | None
    after: float | None
    seconds_per_step: float | None
    validations: tuple[Sequence[int], Sequence[float]]
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone.

    Attributes:
        runs: At least one, by seed.
        settings: What tells the group from others of the same recipe and algorithm.
    """

    runs: tuple[Run, ...]
    settings: str

    @property
    def label(self) -> str:
        """Recipe, algorithm and settings."""
        first = self.runs[0]
        return " ".join(filter(None, (first.recipe, first.algorithm, self.settings)))


def read_run(folder: Path) -> Run:
    """Read one run.

    Raises:
        DataError: The folder holds no finished run; names what it lacks.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    lacking = [name for name in FILES if not (folder / name).is_file()]
    if lacking:
        inside = sorted(path.parent for path in folder.glob("*/summary.json"))
        hint = f"; it contains runs, such as {inside[0]}" if inside else ""
        raise DataError(f"{folder} is no finished run: it has no {', '.join(lacking)}{hint}")
    metrics = MetricsFile(folder / "metrics.jsonl")
    try:
        summary = json.loads((folder / "summary.json").read_text())
        config = OmegaConf.load(folder / "config.yaml")
        metrics.read_new()
        if not isinstance(config, DictConfig):
            raise TypeError("config.yaml is not a mapping")
        for name in NUMBERS:
            if not isinstance(summary[name], int | float | None):
                raise TypeError(f"summary.json: {name}={summary[name]!r}")
        names = config.get("names") or {}
        seconds = metrics.series("timing_s/step")[1]
        return Run(
            folder=folder,
            recipe="-".join(names.values()) or str(config.trainer.experiment_name),
            algorithm=str(summary["algorithm"]),
            seed=summary["seed"],
            steps=int(summary["steps"]),
            before=summary["success_before"],
            after=summary["success_after"],
            seconds_per_step=median(seconds) if seconds else None,
            validations=metrics.success(),
            settings=comparable_settings(config, summary["seed"]),
        )
    except Exception as error:
        raise DataError(f"{folder} is no readable run: {error}") from error


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read runs; all folders that are none are named in one error.

    Raises:
        DataError: A folder is no run, or is given twice.
    """
    runs: dict[Path, Run] = {}
    problems = []
    for folder in folders:
        if folder.resolve() in runs:
            problems.append(f"{folder} is given twice")
            continue
        try:
            runs[folder.resolve()] = read_run(folder)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    return list(runs.values())


def comparable_settings(config: DictConfig, seed: int | None) -> dict[str, str]:
    """Flatten a configuration, without seeds and places.

    Paths and names often contain the seed, so it is replaced in strings.
    """
    flat: dict[str, str] = {}
    # Not the digits of a word such as fsdp2.
    number = re.compile(rf"(?:(?<![A-Za-z\d])|(?<=seed)){seed}(?![A-Za-z\d])")
    for key, value in leaves(OmegaConf.to_container(config, resolve=False)):
        if key.rsplit(".", 1)[-1] not in SEED_KEYS and not key.startswith(PLACES):
            flat[key] = number.sub("<seed>", value) if isinstance(value, str) else repr(value)
    return flat


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ by their seed alone.

    Raises:
        DataError: Two runs have the same settings and seed, and would count twice.
    """
    groups: dict[str, dict[int | None, Run]] = {}
    for run in sorted(runs, key=lambda run: (run.recipe, run.algorithm, run.seed or 0)):
        by_seed = groups.setdefault(json.dumps(run.settings, sort_keys=True), {})
        if run.seed in by_seed:
            raise DataError(
                f"{by_seed[run.seed].folder} and {run.folder} have the same settings and seed; "
                "give one of them"
            )
        by_seed[run.seed] = run
    found = [tuple(by_seed.values()) for by_seed in groups.values()]
    firsts = [group[0] for group in found]
    return [Group(group, _told_apart(group[0], firsts)) for group in found]


def _told_apart(run: Run, others: Sequence[Run]) -> str:
    """The first few settings in which runs of the same recipe and algorithm differ."""
    rivals = [o for o in others if (o.recipe, o.algorithm) == (run.recipe, run.algorithm)]
    told: dict[str, None] = {}
    for key in sorted({key for rival in rivals for key in rival.settings}):
        name = key.rsplit(".", 1)[-1]
        # The name of an experiment follows from its settings.
        if name != "experiment_name" and len({rival.settings.get(key) for rival in rivals}) > 1:
            # One setting often stands in several places; it is told once.
            told.setdefault(f"{name}={run.settings.get(key)}")
    more = [f"and {len(told) - SETTINGS_SHOWN} more"] if len(told) > SETTINGS_SHOWN else []
    return " ".join([*list(told)[:SETTINGS_SHOWN], *more])
