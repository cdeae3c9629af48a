"""Studies of the lab: their runs in parquet files, and the numbers that compare them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from hpo_verl.config.recipes import recipes_directory
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.statistics import (
    COLLAPSE_FRACTION,
    MEASURES,
    improvement_probability,
    interval,
    measures,
)
from hpo_verl.runs.files import write_atomically

COMPARED = "area"
"""Measure whose difference from the baseline is reported."""
_KEY = b"hpo_verl_lab"
_SETTINGS = ("training", "evaluation")
_IDENTITY = ("study", "task", "warm_start", "variant", "algorithm", "seed")


class Result(NamedTuple):
    """A finished run of the lab.

    Attributes:
        facts: The run's settings (`cell`), `status` (`finished` or `diverged`), `seconds`,
            `warm_start_success`, and `environment`: commit, versions, machine, command, time.
        rows: One per step: `step`, `success` (NaN where not measured), statistics of the batch.
    """

    facts: dict[str, Any]
    rows: pd.DataFrame

    @property
    def cell(self) -> dict[str, Any]:
        """Fields of its `hpo_verl.lab.settings.Cell`."""
        return self.facts["cell"]

    @property
    def measured(self) -> pd.DataFrame:
        """Rows in which success was measured."""
        return self.rows.dropna(subset="success")

    def thinned(self) -> Result:
        """Keep the measured steps and the first one, in single precision.

        What lies between repeats itself; a file that is kept in the repository must be small.
        """
        kept = self.rows[self.rows["success"].notna() | (self.rows["step"] <= 1)]
        return Result(self.facts, kept.astype("float32").astype(float).reset_index(drop=True))


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write runs as one parquet file, a row per run and step; there whole or not at all.

    Metadata `hpo_verl_lab` holds `cells`, the facts of each run, and `shared`: what many runs
    have in common, to which the facts refer by place.

    Raises:
        DataError: The file cannot be written.
    """
    shared: list[dict[str, Any]] = []
    cells, frames = [], []

    def place(facts: dict[str, Any]) -> int:
        if facts not in shared:
            shared.append(facts)
        return shared.index(facts)

    for result in results:
        environment = dict(result.facts["environment"])
        finished = environment.pop("finished", "")
        cell = {k: place(v) if k in _SETTINGS else v for k, v in result.cell.items()}
        common = {"cell": cell, "environment": place(environment), "finished": finished}
        cells.append({**result.facts, **common, "rows": len(result.rows)})
        identity = {key: result.cell[key] for key in _IDENTITY}
        statistics = result.rows.astype("float32")
        frames.append(statistics.assign(**identity, status=result.facts["status"]))
    table = pa.Table.from_pandas(pd.concat(frames), preserve_index=False)
    manifest = json.dumps({"shared": shared, "cells": cells})
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_KEY: manifest}), buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue().to_pybytes())
    except OSError as error:
        raise DataError(f"{path}: cannot write: {error}") from error


def read_results(path: Path) -> list[Result]:
    """Read the runs of a file or a folder; raises DataError for a file that holds none."""
    if not path.is_file():
        return [result for file in sorted(path.glob("*.parquet")) for result in read_results(file)]
    try:
        return list(_read_file(path))
    except Exception as error:
        raise DataError(f"{path}: is no result of hpo-verl lab") from error


def _read_file(path: Path) -> Iterator[Result]:
    table = pq.read_table(path)
    manifest = json.loads((table.schema.metadata or {})[_KEY])
    shared, start = manifest["shared"], 0
    rows = table.drop_columns([*_IDENTITY, "status"]).to_pandas().astype(float)
    for facts in manifest["cells"]:
        end = start + facts.pop("rows")
        environment = {**shared[facts["environment"]], "finished": facts.pop("finished")}
        cell = {k: shared[v] if k in _SETTINGS else v for k, v in facts["cell"].items()}
        facts = {**facts, "cell": cell, "environment": environment}
        yield Result(facts, rows.iloc[start:end].reset_index(drop=True))
        start = end


def require_same_settings(folder: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Refuse to compare runs that trained or were measured differently, by a ConfigError."""
    for section in ("evaluation",):
        for cell in cells:
            for key, value in cell[section].items():
                first = cells[0][section][key]
                # The run's own learning rate counts, not the study's default.
                if key != "learning_rate" and value != first:
                    raise ConfigError(
                        f"{folder}: holds runs with {section}.{key} = {first} and {value}, which "
                        "cannot be compared; give one of them a folder of its own with --out"
                    )


class Regime(NamedTuple):
    """A task and the success that its runs begin with."""

    task: str
    warm_start: float

    @property
    def title(self) -> str:
        """For headings."""
        return f"{self.task}, warm start {self.warm_start:.0%}"


class Comparison:
    """The runs of one study; `recipes/lab/<study>.yaml` says baseline and order of the variants.

    Attributes:
        results: Its finished runs, thinned.
        rates: Learning rate of every variant; with several, the one whose mean area on
            the first quarter of the seeds was largest.
        tuned: Seeds that chose the rates, and are left out of every comparison.
        runs: For every regime the compared runs of every variant: a row per run, by seed, with its
            measures, `collapsed`, `responses` per step, and the `result` itself.
    """

    def __init__(self, study: str, results: Sequence[Result]) -> None:
        require_same_settings(Path(study), [result.cell for result in results])
        self.study = study
        self.results = [result.thinned() for result in results]
        self.baseline, order = _study_file(study)
        # pandas cannot say which of its types an index gives.
        runs: Any = pd.DataFrame([_reduced(result) for result in self.results])
        names = set(runs["variant"])
        self.variants = [name for name in order if name in names] + sorted(names - set(order))
        seeds = sorted(set(runs["seed"]))
        several = runs.groupby("variant")["learning_rate"].nunique().max() > 1
        self.tuned = set(seeds[: max(1, len(seeds) // 4)]) if several and len(seeds) > 1 else set()
        tuning = runs[runs["seed"].isin(self.tuned)] if self.tuned else runs
        areas = tuning.groupby(["variant", "learning_rate"])["area"].mean()
        # A variant without any of these seeds keeps the rate of its first run.
        first = runs.groupby("variant")["learning_rate"].first()
        self.rates = {
            name: float(areas[name].idxmax() if name in areas else first[name])
            for name in self.variants
        }
        chosen = runs["learning_rate"] == runs["variant"].map(self.rates)
        compared = runs[chosen & ~runs["seed"].isin(self.tuned)].sort_values("seed")
        self.runs: dict[Regime, dict[str, pd.DataFrame]] = {
            Regime(*key): {
                name: found[found["variant"] == name].set_index("seed")
                for name in self.variants
                if name in set(found["variant"])
            }
            for key, found in compared.groupby(["task", "warm_start"])
        }

    @property
    def setting(self) -> str:
        """How the runs trained and were measured, in a sentence."""
        cell = self.results[0].cell
        training, evaluation = cell["training"], cell["evaluation"]
        rates = sorted({result.cell["learning_rate"] for result in self.results})
        seeds = {result.cell["seed"] for result in self.results}
        return (
            f"{len(self.results)} runs, {len(seeds)} seeds, {training['steps']} steps of "
            f"{training['prompts_per_step']} x {training['responses_per_prompt']} responses in "
            f"{training['mini_batches']} mini-batches, AdamW at "
            f"{', '.join(f'{rate:g}' for rate in rates)}; success on {evaluation['questions']} "
            f"held-out questions every {evaluation['every']} steps."
        )

    def beginning(self, regime: Regime) -> str:
        """What was measured before training, in a sentence."""
        results = pd.concat(self.runs[regime].values())["result"]
        success = [result.measured["success"].iloc[0] for result in results]
        first: Any = pd.DataFrame([result.rows.loc[1] for result in results]).mean()
        return (
            f"Measured before training: success {min(success):.1%} to {max(success):.1%} by seed; "
            f"responses of the first batch {first['response_length']:.1f} tokens on average, "
            f"standard deviation {first['response_length_std']:.1f}."
        )

    def rows(self, regime: Regime) -> list[dict[str, Any]]:
        """Table of a regime: title of a column -> text, number, `Interval`, or None.

        Runs that lost half of the success that they began with, or diverged, have collapsed.
        `COMPARED` is compared with the baseline: its difference, paired by seed, and the
        probability that a random run is better. Variants without a run are left out.
        """
        found, rows = self.runs[regime], []
        for variant, runs in found.items():
            difference = improvement = None
            if variant != self.baseline and self.baseline in found:
                ours, theirs = runs[COMPARED].align(found[self.baseline][COMPARED], join="inner")
                if len(ours):
                    difference = interval(ours - theirs)
                    improvement = improvement_probability(ours, theirs)
            rows.append(
                {
                    "method": f"`{variant}`",
                    "lr": f"{self.rates[variant]:g}",
                    "runs": len(runs),
                    "collapsed": int(runs["collapsed"].sum()),
                    "responses": round(runs["responses"].mean()),
                    **{title: interval(runs[name]) for name, title in MEASURES.items()},
                    f"{COMPARED} - {self.baseline}": difference,
                    f"P(better {COMPARED})": improvement,
                }
            )
        return rows


def _reduced(result: Result) -> dict[str, Any]:
    measured = result.measured
    found = measures(measured["step"], measured["success"])
    lost = found["final"] < COLLAPSE_FRACTION * measured["success"].iloc[0]
    sampled = result.rows.dropna(subset="responses_sampled").iloc[-1:]
    return {
        **{key: result.cell[key] for key in _IDENTITY},
        **found,
        "collapsed": lost or result.facts["status"] == "diverged",
        "responses": float((sampled["responses_sampled"] / sampled["step"]).sum()),
        "result": result,
    }


def _study_file(study: str) -> tuple[str, list[str]]:
    """Baseline and variants that `recipes/lab` names; no variants where the study is unknown."""
    folder = recipes_directory() / "lab"
    base, own = OmegaConf.load(folder / "base.yaml"), folder / f"{study}.yaml"
    content: Any = OmegaConf.merge(base, OmegaConf.load(own)) if own.is_file() else base
    return str(content["baseline"]), [str(name) for name in content["variants"]]


def best_rate(areas):
    return max(sorted(areas), key=lambda r: sum(areas[r]) / len(areas[r]))


def area_of(result):
    m = result.measured
    return measures(m["step"], m["success"])["area"]
