"""From finished cells to the numbers of the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpo_verl.lab.results import Result
from hpo_verl.lab.statistics import (
    MEASURES,
    THRESHOLD_FACTOR,
    Interval,
    collapsed,
    improvement_probability,
    interquartile_interval,
    measures,
    paired_difference,
)

BASELINE = "grpo"
_COMPARED = ("final", "area")


class Regime(NamedTuple):
    """A task and the success that its runs begin with."""

    task: str
    warm_start: float

    @property
    def title(self) -> str:
        """For headings."""
        return f"{self.task}, warm start {self.warm_start:.0%}"


class Run(NamedTuple):
    """One cell, reduced.

    Attributes:
        seed: Of the cell.
        result: What was kept of it.
        measures: See `hpo_verl.lab.statistics.measures`.
        collapsed: Whether it lost what it began with.
    """

    seed: int
    result: Result
    measures: dict[str, float]
    collapsed: bool

    def measured(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps at which success was measured, and the success."""
        return _measured(self.result)


class Row(NamedTuple):
    """A line of the report's table.

    Attributes:
        variant: Name of the method.
        learning_rate: Of its runs.
        runs: How many.
        collapses: How many of them lost what they began with.
        reached: How many reached the threshold.
        responses: Responses sampled per step.
        measures: Interval of every measure.
        differences: Paired difference of `final` and `area` from the baseline; empty for it.
        improvement: Probability of improvement over the baseline; empty for it.
    """

    variant: str
    learning_rate: float
    runs: int
    collapses: int
    reached: int
    responses: float
    measures: dict[str, Interval]
    differences: dict[str, Interval]
    improvement: dict[str, Interval]


class Comparison:
    """The runs of one study.

    Args:
        study: Its name.
        results: Its finished cells.

    Attributes:
        regimes: In order of task and level.
        variants: In order of the study's file.
        rates: Learning rate of every variant; with several, the one whose mean area on
            the first quarter of the seeds was largest.
        tuned: Seeds that chose the rates, and are left out of every comparison.
    """

    def __init__(self, study: str, results: Sequence[Result], order: Sequence[str] = ()) -> None:
        self.study = study
        cells = [result.cell for result in results]
        self.regimes = sorted({Regime(cell["task"], cell["warm_start"]) for cell in cells})
        names = {cell["variant"] for cell in cells}
        known = [name for name in order if name in names]
        self.variants = known + sorted(names - set(known))
        seeds = sorted({cell["seed"] for cell in cells})
        several = any(
            len({cell["learning_rate"] for cell in cells if cell["variant"] == name}) > 1
            for name in names
        )
        self.tuned = set(seeds[: max(1, len(seeds) // 4)]) if several and len(seeds) > 1 else set()
        self.rates = {name: self._best_rate(name, results) for name in self.variants}
        self._runs: defaultdict[tuple[Regime, str], list[Run]] = defaultdict(list)
        for result in results:
            cell = result.cell
            if cell["seed"] in self.tuned or cell["learning_rate"] != self.rates[cell["variant"]]:
                continue
            regime = Regime(cell["task"], cell["warm_start"])
            self._runs[regime, cell["variant"]].append(_run(result))
        for runs in self._runs.values():
            runs.sort(key=lambda run: run.seed)

    def runs(self, regime: Regime, variant: str) -> list[Run]:
        """Runs of a variant in a regime, by seed; empty if there are none."""
        return self._runs.get((regime, variant), [])

    def beginning(self, regime: Regime) -> str:
        """What was measured before training, in a sentence."""
        runs = [run for variant in self.variants for run in self.runs(regime, variant)]
        first = [run.measured()[1][0] for run in runs]
        length = [run.result.columns["response_length"][1] for run in runs]
        spread = [run.result.columns["response_length_std"][1] for run in runs]
        return (
            f"Measured before training: success {min(first):.1%} to {max(first):.1%} by seed; "
            f"responses of the first batch {np.mean(length):.1f} tokens on average, standard "
            f"deviation {np.mean(spread):.1f}."
        )

    def rows(self, regimes: Sequence[Regime]) -> list[Row]:
        """Table over regimes, several pooled as strata; variants without a run are left out."""
        return [
            self._row(variant, regimes)
            for variant in self.variants
            if any(self.runs(regime, variant) for regime in regimes)
        ]

    def _row(self, variant: str, regimes: Sequence[Regime]) -> Row:
        strata = [runs for regime in regimes if (runs := self.runs(regime, variant))]
        every = [run for runs in strata for run in runs]
        pairs = [
            pair
            for regime in regimes
            if (pair := _paired(self.runs(regime, variant), self.runs(regime, BASELINE)))[0]
        ]
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        compared = _COMPARED if variant != BASELINE and pairs else ()
        return Row(
            variant=variant,
            learning_rate=self.rates[variant],
            runs=len(every),
            collapses=sum(run.collapsed for run in every),
            reached=sum(int(run.measures["reached"]) for run in every),
            responses=float(np.mean([_responses_per_step(run.result) for run in every])),
            measures={name: interquartile_interval(_values(strata, name)) for name in MEASURES},
            differences={
                name: paired_difference(_values(ours, name), _values(theirs, name))
                for name in compared
            },
            improvement={
                name: improvement_probability(_values(ours, name), _values(theirs, name))
                for name in compared
            },
        )

    def _best_rate(self, variant: str, results: Sequence[Result]) -> float:
        areas: defaultdict[float, list[float]] = defaultdict(list)
        for result in results:
            cell = result.cell
            if cell["variant"] == variant and (not self.tuned or cell["seed"] in self.tuned):
                areas[cell["learning_rate"]].append(_run(result).measures["area"])
        if not areas:
            return next(r.cell["learning_rate"] for r in results if r.cell["variant"] == variant)
        return max(areas, key=lambda rate: float(np.mean(areas[rate])))


def _run(result: Result) -> Run:
    steps, success = _measured(result)
    found = measures(steps, success, THRESHOLD_FACTOR * result.cell["warm_start"])
    lost = collapsed(success, found["final"], result.facts["status"])
    return Run(result.cell["seed"], result, found, lost)


def _measured(result: Result) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps, success = (np.asarray(result.columns[name]) for name in ("step", "success"))
    there = ~np.isnan(success)
    return steps[there], success[there]


def _responses_per_step(result: Result) -> float:
    sampled = np.asarray(result.columns["responses_sampled"])
    steps = np.flatnonzero(~np.isnan(sampled))
    return float(sampled[steps[-1]] / steps[-1]) if len(steps) else 0.0


def _paired(ours: list[Run], theirs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Runs of both whose seeds both have."""
    shared = {run.seed for run in ours} & {run.seed for run in theirs}
    return [r for r in ours if r.seed in shared], [r for r in theirs if r.seed in shared]


def _values(strata: Sequence[list[Run]], name: str) -> list[Any]:
    return [[run.measures[name] for run in runs] for runs in strata]
