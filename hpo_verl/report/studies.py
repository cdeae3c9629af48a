"""Finished runs of the lab, and the parquet files that keep them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hpo_verl.config.studies import regime_of
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.parquet import Shared, read_runs, write_runs
from hpo_verl.report.statistics import measures

_KEY = b"hpo_verl_lab"
# Columns for whoever opens a file without this package; numbers that may be lacking come second.
_TEXTS = ("study", "task", "lacking", "variant", "algorithm", "status")
_NUMBERS = ("warm_start", "wrong_length", "max_response_length", "learning_rate", "seed")
DISSECTED = "positive_gradient_norm"
"""A column that is there where the update of a step was dissected."""


class Result(NamedTuple):
    """A finished run of the lab.

    Attributes:
        facts: The run's settings (`cell`), whether it is `tuning`, so that it chooses a rate and is
            not compared, `status` (`finished` or `diverged`), `seconds`, `warm_start_success`,
            `began_with` (SHA-256 of the first policy's weights; older runs lack it), and
            `environment`: commit, versions, machine, command, time.
        rows: One per step: `step`, `success` (NaN where not measured), statistics of the batch;
            `pass@1`, `pass@2`, ... in the first and last row, if they were measured; at dissected
            steps what the positive and the negative advantages do, each alone.
    """

    facts: dict[str, Any]
    rows: pd.DataFrame

    @property
    def cell(self) -> dict[str, Any]:
        """Fields of its `hpo_verl.lab.settings.Cell`."""
        return self.facts["cell"]

    @property
    def identity(self) -> tuple[Any, ...]:
        """Study, regime, policy, variant and seed: what there is to be one run of."""
        cell = self.cell
        regime = tuple(regime_of(cell).items())
        return cell["study"], regime, cell["policy"], cell["variant"], cell["seed"]

    @property
    def beginning(self) -> tuple[Any, ...]:
        """What runs that began with the same policy share, and others do not.

        A seed's warm start may differ between machines. The digest tells; runs that lack it are
        told apart by two measurements of the first policy's success.
        """
        if "began_with" in self.facts:
            return (self.facts["began_with"],)
        return self.facts["warm_start_success"], float(self.rows["success"].iloc[0])

    @property
    def measured(self) -> pd.DataFrame:
        """Rows in which success was measured."""
        return self.rows.dropna(subset="success")

    def thinned(self) -> Result:
        """Keep the steps that were measured or dissected and the first one, in single precision.

        What lies between repeats itself; a file that is kept in the repository must be small.
        """
        found = self.rows["success"].notna() | (self.rows["step"] <= 1)
        if DISSECTED in self.rows:
            found |= self.rows[DISSECTED].notna()
        kept = self.rows[found]
        return Result(self.facts, kept.astype("float32").astype(float).reset_index(drop=True))


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write runs as one parquet file, a row per run and step; there whole or not at all.

    Metadata `hpo_verl_lab` holds `runs`, the facts of each run, and `shared`: what many runs
    have in common, to which the facts refer by place.

    Raises:
        DataError: The file cannot be written.
    """
    shared, runs, frames = Shared(), [], []
    for result in results:
        cell, environment = dict(result.cell), dict(result.facts["environment"])
        own = {"seed": cell.pop("seed"), "finished": environment.pop("finished", "")}
        common = {"cell": shared.place(cell), "environment": shared.place(environment)}
        runs.append({**result.facts, **own, **common, "rows": len(result.rows)})
        frames.append(result.rows.astype("float32").assign(**_identity(result)))
    write_runs(path, _KEY, frames, runs, shared)


def require_same_settings(folder: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a folder of runs that were measured differently, by a ConfigError."""
    for cell in cells:
        for key, value in cell["evaluation"].items():
            first = cells[0]["evaluation"][key]
            if value != first:
                raise ConfigError(
                    f"{folder}: holds runs with evaluation.{key} = {first} and {value}, which "
                    "cannot be compared; give one of them a folder of its own with --out"
                )


def area_of(result: Result) -> float:
    """Area under a run's curve of success, divided by its budget."""
    measured = result.measured
    return measures(measured["step"], measured["success"])["area"]


def best_rate(areas: Mapping[float, Sequence[float]]) -> float:
    """The learning rate with the largest mean area; of equal ones the smallest.

    Lab and report both choose by it, on seeds that are not compared.

    Args:
        areas: For every rate the area of each of its runs, one at least.
    """
    return min(areas, key=lambda rate: (-sum(areas[rate]) / len(areas[rate]), rate))


def merged(kept: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """All runs, each once; what is new replaces what is kept of the same identity."""
    return list({result.identity: result for results in (kept, new) for result in results}.values())


def read_results(path: Path) -> list[Result]:
    """Read the runs of a file or a folder; raises DataError for a file that holds none."""
    if not path.is_file():
        return [result for file in sorted(path.glob("*.parquet")) for result in read_results(file)]
    try:
        return list(_read_file(path))
    except Exception as error:
        raise DataError(f"{path}: is no result of hpo-verl lab") from error


def _read_file(path: Path) -> Iterator[Result]:
    runs, shared, frames = read_runs(path, _KEY, [*_TEXTS, *_NUMBERS])
    for facts, rows in zip(runs, frames, strict=True):
        environment = {**shared[facts["environment"]], "finished": facts.pop("finished")}
        cell = {**shared[facts["cell"]], "seed": facts.pop("seed")}
        yield Result({**facts, "cell": cell, "environment": environment}, rows)


def _identity(result: Result) -> dict[str, Any]:
    cell = result.cell
    values = {**cell, **cell["training"], "status": result.facts["status"]}
    numbers = {key: math.nan if values[key] is None else float(values[key]) for key in _NUMBERS}
    return {key: values[key] for key in _TEXTS} | numbers
