"""Runs through verl itself, `hpo-verl train`: what is kept of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from hpo_verl.config.recipes import recipes_directory
from hpo_verl.config.settings import leaves
from hpo_verl.errors import DataError
from hpo_verl.report.parquet import Shared, read_runs, write_runs
from hpo_verl.report.runs import comparable_settings, read_run
from hpo_verl.runs.metrics import MetricsFile

MANIFEST = "manifest.json"
_KEY = b"hpo_verl_runs"
_SHARED = ("settings", "versions")
# What is kept of the metrics, and verl's names for it.
_SERIES = {
    "alpha": "hpo/alpha",
    "solve_rate": "hpo/solve_rate",
    "response_length": "response_length/mean",
    "response_length_positive": "hpo/response_length_positive",
    "response_length_negative": "hpo/response_length_negative",
    "entropy": "actor/entropy",
}
# Where the files lie that a run reads, which are compared by their hash; what names follow from
# settings; and the critic, which no algorithm here has, and which repeats the actor's settings.
_LEFT_OUT = (
    *("prepare.", "data.train_files", "data.val_files", "actor_rollout_ref.model.path"),
    *("names.", "critic."),
)
_FOLLOWS = "experiment_name"


class VerlRun(NamedTuple):
    """A finished run of verl's trainer.

    Attributes:
        facts: `recipe` (task and model); `algorithm`, as one would ask for it: the nearest recipe
            of `algo/` and what differs from it; `seed`, `steps`, `seconds`, `versions`, `commit`,
            `created`; `policy` and `data`, SHA-256 of what it began with and trained
            on, as the run itself noted; `settings`, its configuration without seeds, places and
            files.
        rows: By step: `step`, `success` (NaN where not measured), alpha, lengths, entropy.
    """

    facts: dict[str, Any]
    rows: pd.DataFrame

    @property
    def curve(self) -> pd.Series:
        """Success by step."""
        return self.rows.dropna(subset="success").set_index("step")["success"]

    @property
    def identity(self) -> str:
        """What there is to be one run of; everything but times, versions and results."""
        keys = ("recipe", "algorithm", "seed", "steps", "policy", "data", "settings")
        return json.dumps([self.facts[key] for key in keys], sort_keys=True)


def is_verl_run(folder: Path) -> bool:
    """Whether a folder is one of `hpo-verl train`."""
    return (folder / "summary.json").is_file()


def read_verl_run(folder: Path) -> VerlRun:
    """Read a finished run.

    Raises:
        DataError: It is no finished run, or lacks the manifest that says what it began with.
    """
    run = read_run(folder)
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.read_new()
    try:
        summary = json.loads((folder / "summary.json").read_text())
        made = json.loads((folder / MANIFEST).read_text())
        config = OmegaConf.load(folder / "config.yaml")
        assert isinstance(config, DictConfig)  # noqa: S101 - `read_run` has seen to it
        settings = _kept(comparable_settings(config, run.seed))
        facts = {
            "recipe": run.name.replace(f" {summary['algorithm']}", "", 1),
            "algorithm": described_algorithm(settings),
            "seed": run.seed,
            "steps": summary["steps"],
            "seconds": float(summary["seconds"]),
            "versions": summary["versions"],
            "commit": _commit(made["git"]),
            "created": made["created"],
            "policy": made["policy"]["sha256"],
            "data": [file["sha256"] for file in made["data"]],
            "settings": settings,
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{folder}: cannot be kept: {type(error).__name__}: {reason}") from error
    series = {"success": metrics.success()}
    series |= {name: metrics.series(key) for name, key in _SERIES.items()}
    columns = {
        name: pd.Series(values, steps, dtype=float) for name, (steps, values) in series.items()
    }
    rows = pd.DataFrame(columns).sort_index().rename_axis("step").reset_index()
    return VerlRun(facts, rows.astype(float))


def _commit(git: Mapping[str, Any] | None) -> str:
    return "unknown" if git is None else git["commit"][:12] + ("+" if git["changed"] else "")


def _kept(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings that can tell one experiment from another."""
    return {
        key: value
        for key, value in settings.items()
        if not key.startswith(_LEFT_OUT)
        and not key.endswith(_FOLLOWS)
        and not value.startswith((os.sep, "file:"))
    }


def described_algorithm(settings: Mapping[str, str]) -> str:
    """The nearest recipe of `algo/`, and what differs from it: `grpo clip_ratio=0.3`."""
    nearest = nearest_recipe(settings)
    changes = {
        f"{key.rpartition('.')[2]}={settings.get(key)}" for key in _unlike(settings, nearest)
    }
    name = next(name for name, recipe in _algorithm_recipes().items() if recipe is nearest)
    return " ".join([name, *sorted(changes)])


def nearest_recipe(settings: Mapping[str, str]) -> Mapping[str, str]:
    """The recipe of `algo/` of whose values the fewest differ; of several the one with most."""

    def order(recipe: Mapping[str, str]) -> tuple[int, int]:
        return len(_unlike(settings, recipe)), -len(recipe)

    return min(_algorithm_recipes().values(), key=order)


def _unlike(settings: Mapping[str, str], recipe: Mapping[str, str]) -> list[str]:
    """Keys of a recipe that have another value in some settings."""
    return [
        key
        for key, value in recipe.items()
        # What follows from other settings says nothing of the algorithm.
        if not value.startswith("${") and settings.get(key) != value
    ]


@cache
def _algorithm_recipes() -> dict[str, dict[str, str]]:
    """Values of every recipe of `algo/` by dotted key, as `comparable_settings` writes them."""
    found = {}
    for path in sorted((recipes_directory() / "algo").glob("*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        found[path.stem] = {
            key: value if isinstance(value, str) else repr(value) for key, value in leaves(content)
        }
    return found


def merged_runs(kept: Iterable[VerlRun], new: Iterable[VerlRun]) -> list[VerlRun]:
    """All runs, each once, by recipe, seed and algorithm; a new one replaces its like."""
    found = {run.identity: run for runs in (kept, new) for run in runs}
    order = ("recipe", "seed", "algorithm", "created")
    return sorted(found.values(), key=lambda run: [str(run.facts[key]) for key in order])


def write_verl_runs(path: Path, runs: Sequence[VerlRun]) -> None:
    """Write runs as one parquet file, a row per run and step, their facts in its metadata."""
    shared, facts, frames = Shared(), [], []
    for run in runs:
        common = {key: shared.place(run.facts[key]) for key in _SHARED}
        facts.append({**run.facts, **common, "rows": len(run.rows)})
        columns = {key: run.facts[key] for key in ("recipe", "algorithm")}
        seed = run.facts["seed"]
        frames.append(run.rows.assign(**columns, seed=math.nan if seed is None else float(seed)))
    write_runs(path, _KEY, frames, facts, shared)


def read_verl_runs(path: Path) -> list[VerlRun]:
    """Read the runs of a file; none where there is no file. Raises DataError for any other file."""
    if not path.is_file():
        return []
    try:
        return list(_read_file(path))
    except Exception as error:
        raise DataError(f"{path}: holds no runs of hpo-verl train") from error


def _read_file(path: Path) -> Iterator[VerlRun]:
    runs, shared, frames = read_runs(path, _KEY, ["recipe", "algorithm", "seed"])
    for facts, rows in zip(runs, frames, strict=True):
        yield VerlRun({**facts, **{key: shared[facts[key]] for key in _SHARED}}, rows)
