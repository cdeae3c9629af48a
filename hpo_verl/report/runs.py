"""Finished runs: read, grouped where they differ by their seed alone, and tabulated."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from hpo_verl.config.settings import leaves
from hpo_verl.errors import DataError, printable
from hpo_verl.report.statistics import interval
from hpo_verl.runs.metrics import MetricsFile, measured

FILES = ("summary.json", "metrics.jsonl", "config.yaml")
# What may differ between two runs of one experiment.
SEED_KEYS = frozenset({"seed", "data_loader_seed"})
PLACES = ("ray_kwargs", "trainer.default_local_dir", "trainer.logger")
SETTINGS_SHOWN = 3
NOT_MEASURED = "-"
SHOWN = {
    "steps": ".0f",
    "before": ".1%",
    "after": ".1%",
    "pass@4": ".1%",
    "pass@8": ".1%",
    "s/step": ".1f",
}
"""Numbers of a run, and how they are printed; pass@k only where a run has one."""
OPTIONAL = ("pass@4", "pass@8")


class Run(NamedTuple):
    """One finished run.

    Attributes:
        name: Task and model, or verl's experiment name; the algorithm; and what success is, if not
            the accuracy on the only data source.
        numbers: `steps`; success on held-out prompts `before` and `after` training, and `pass@4`
            and `pass@8` of the last validation, fractions; `s/step`, the median of verl's
            `timing_s/step`. NaN where not measured.
        curve: Success by step.
        settings: Dotted key -> value of the configuration without seeds and places.
    """

    folder: Path
    name: str
    seed: int | None
    numbers: dict[str, float]
    curve: pd.Series
    settings: Mapping[str, str]


def read_run(folder: Path) -> Run:
    """Read one run; raises DataError that names what a folder without a finished run lacks."""
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
        names = config.get("names") or {}
        recipe = "-".join(names.values()) or str(config.trainer.experiment_name)
        # The median: the first step is slower than the others.
        seconds = pd.Series(metrics.series("timing_s/step")[1], dtype=float).median()
        chances = {f"pass@{k}": found[-1] for k, (_, found) in metrics.pass_at_k().items()}
        values = [
            summary["steps"],
            summary["success_before"],
            summary["success_after"],
            *(chances.get(name) for name in OPTIONAL),
            seconds,
        ]
        steps, success = metrics.success()
        seed = None if summary["seed"] is None else int(summary["seed"])
        return Run(
            folder,
            f"{recipe} {summary['algorithm']}{measured(metrics.sources())}",
            seed,
            dict(zip(SHOWN, [math.nan if v is None else float(v) for v in values], strict=True)),
            pd.Series(success, steps, dtype=float),
            comparable_settings(config, seed),
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{folder} is no readable run: {reason}") from error


def read_runs(folders: Iterable[Path], announce: Callable[[str], None] = print) -> list[Run]:
    """Read finished runs; whatever is none is announced and left out, and so is a second naming.

    Raises:
        DataError: none of them is a finished run; names what is wrong with each.
    """
    runs: dict[Path, Run] = {}
    problems = []
    for folder in folders:
        try:
            if folder.resolve() in runs:
                raise DataError(f"{folder} is given twice")
            runs[folder.resolve()] = read_run(folder)
        except (DataError, OSError) as error:
            problems.append(printable(error))
    if not runs:
        raise DataError("; ".join(problems))
    for text in problems:
        announce(f"warning: {text}; it is left out")
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


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that differ by their seed alone; a group's label tells it from the others.

    Raises:
        DataError: Two runs have the same settings and seed, and would count twice.
    """
    groups: dict[str, dict[int | None, Run]] = {}
    for run in sorted(runs, key=lambda run: (run.name, run.seed or 0)):
        by_seed = groups.setdefault(json.dumps(run.settings, sort_keys=True), {})
        if run.seed in by_seed:
            raise DataError(
                f"{by_seed[run.seed].folder} and {run.folder} have the same settings and seed; "
                "give one of them"
            )
        by_seed[run.seed] = run
    found = [list(by_seed.values()) for by_seed in groups.values()]
    labels = [_label(group[0], [other[0] for other in found]) for group in found]
    # Settings beyond the first few may be all that differs.
    return {
        f"{label} #{i}" if labels.count(label) > 1 else label: group
        for i, (label, group) in enumerate(zip(labels, found, strict=True), 1)
    }


def _label(run: Run, others: Sequence[Run]) -> str:
    """Name of a run, and the first few settings in which runs of the same name differ."""
    rivals = [other for other in others if other.name == run.name]
    told: dict[str, None] = {}
    for key in sorted({key for rival in rivals for key in rival.settings}):
        name = key.rsplit(".", 1)[-1]
        # The name of an experiment follows from its settings.
        if name != "experiment_name" and len({rival.settings.get(key) for rival in rivals}) > 1:
            # One setting often stands in several places; it is told once.
            told.setdefault(f"{name}={run.settings.get(key)}")
    more = [f"and {len(told) - SETTINGS_SHOWN} more"] if len(told) > SETTINGS_SHOWN else []
    words = " ".join([run.name, *list(told)[:SETTINGS_SHOWN], *more]).split()
    return printable(" ".join(words))


def runs_table(groups: Mapping[str, Sequence[Run]], columns: int = 0) -> str:
    """A table per group: one row a run, and for several seeds one with mean and interval.

    What is wider than so many columns, if any, goes on below.
    """
    parts = ["success on held-out prompts; interquartile mean [95 % bootstrap interval over seeds]"]
    for label, runs in groups.items():
        values = pd.DataFrame([run.numbers for run in runs])
        shown = {
            name: template
            for name, template in SHOWN.items()
            if name not in OPTIONAL or values[name].notna().any()
        }
        table = pd.DataFrame(
            {name: [_shown(v, template) for v in values[name]] for name, template in shown.items()},
            index=[f"seed {run.seed}" for run in runs],
        )
        if len(runs) > 1:
            # A mean over other seeds than the row says would mislead.
            table.loc[f"{len(runs)} seeds"] = [
                NOT_MEASURED
                if values[name].isna().any()
                else interval(values[name]).shown(template)
                for name, template in shown.items()
            ]
        parts.append(f"{label}\n{table.to_string(line_width=columns or None)}")
    return "\n\n".join(parts)


def _shown(value: float, template: str) -> str:
    return NOT_MEASURED if math.isnan(value) else format(value, template)


def curves_of(groups: Mapping[str, Sequence[Run]]) -> dict[str, pd.DataFrame]:
    """Success of every group, a column per seed; the steps at which all of its runs have one."""
    curves = {
        label: [run.curve for run in runs if len(run.curve)] for label, runs in groups.items()
    }
    return {
        label: pd.concat(found, axis=1, join="inner").sort_index()
        for label, found in curves.items()
        if found
    }
