"""The runs of one study, sorted by regime and variant, and what a variant changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from hpo_verl.config.studies import TUNED
from hpo_verl.errors import ConfigError
from hpo_verl.report.regimes import Plan, Regime, read_plan, title, varying
from hpo_verl.report.statistics import FINAL_SHARE, Effect, effect, has_collapsed, measures
from hpo_verl.report.studies import Result, best_rate

COMPARED = "area"
"""Measure whose difference from the baseline is reported first."""
_MEASURED_ALIKE = ("every", "questions")
_AT_THE_END = ("entropy", "response_length")


class Comparison:
    """The runs of one study beside what its file plans; there may be none yet.

    Attributes:
        results: The runs of the study itself.
        lent: Runs of other studies that this one plans too.
        regimes: All of them: those of the plan in its order, then others that were run.
        variants: In the order of the plan, then others.
        runs: For every regime that was run the compared runs of every variant: a row per run, by
            seed, with what `reduced` finds and the `result` itself.
        rates: Where rates are tuned, for every regime and variant the chosen one.
        tried: The same, with the areas from which it was chosen, by rate.
    """

    def __init__(
        self, plan: Plan, results: Sequence[Result], others: Sequence[Result] = ()
    ) -> None:
        self.plan = plan
        self.results = [result.thinned() for result in results]
        _require_comparable(plan, self.results)
        self.lent = [result.thinned() for result in _planned_too(plan, self.results, others)]
        rows = [
            {"regime": plan.regime_of(result.cell), **reduced(result)}
            for result in (*self.results, *self.lent)
        ]
        self.tried: dict[tuple[Regime, str], dict[float, list[float]]] = {}
        self.rates: dict[tuple[Regime, str], float] = {}
        self.regimes = list(dict.fromkeys([*plan.regimes, *(row["regime"] for row in rows)]))
        self.variants = list(dict.fromkeys([*plan.variants, *(row["variant"] for row in rows)]))
        if plan.tuned:
            rows = self._at_best_rates(rows)
        grouped: dict[Regime, dict[str, list[dict[str, Any]]]] = {}
        for row in rows:
            grouped.setdefault(row["regime"], {}).setdefault(row["variant"], []).append(row)
        self.runs = {
            regime: {
                variant: pd.DataFrame(grouped[regime][variant]).set_index("seed").sort_index()
                for variant in self.variants
                if variant in grouped[regime]
            }
            for regime in self.regimes
            if regime in grouped
        }

    @property
    def study(self) -> str:
        """Its name."""
        return self.plan.study

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return self.plan.baseline

    def title(self, regime: Regime) -> str:
        """What tells a regime from the study's others."""
        return title(regime, varying(self.regimes))

    def effect(self, regime: Regime, ours: str, theirs: str, measure: str = COMPARED) -> Effect:
        """What one variant changes against another in a regime, by pairs.

        A pair has the same seed and the same beginning: runs that began with other policies must
        not be paired.
        """
        found = self.runs.get(regime, {})
        if ours not in found or theirs not in found:
            return Effect(0, None)
        values: list[dict[tuple[Any, ...], float]] = []
        for name in (ours, theirs):
            runs: Any = found[name]
            pairing = [(seed, *run.beginning) for seed, run in runs["result"].items()]
            values.append(dict(zip(pairing, runs[measure], strict=True)) if measure in runs else {})
        return effect(*values)

    def lacking(self, regime: Regime) -> list[str]:
        """Variants of the plan without a run in a regime."""
        return [name for name in self.plan.variants if name not in self.runs.get(regime, {})]

    def _at_best_rates(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Choose every variant's rate; keep the other seeds' runs at that rate."""
        apart = {row["seed"] for row in rows if row["result"].facts["tuning"]}
        for row in rows:
            key = row["regime"], row["variant"]
            if row["seed"] in apart:
                self.tried.setdefault(key, {}).setdefault(row["rate"], []).append(row["area"])
        self.rates = {key: best_rate(areas) for key, areas in self.tried.items()}
        for row in rows:
            # A variant without a seed set aside keeps the rate that it was given.
            self.rates.setdefault((row["regime"], row["variant"]), row["rate"])
        return [
            row
            for row in rows
            if row["seed"] not in apart and row["rate"] == self.rates[row["regime"], row["variant"]]
        ]


def compare_studies(
    results: Mapping[str, Sequence[Result]], studies: Sequence[str]
) -> list[Comparison]:
    """Compare some studies, each with its own runs and those of the others that it plans too."""
    found = []
    for name in studies:
        others = [run for study, runs in results.items() if study != name for run in runs]
        found.append(Comparison(read_plan(name), results.get(name, ()), others))
    return found


def reduced(result: Result) -> dict[str, Any]:
    """Numbers of a run; NaN where it has none.

    Returns:
        `variant`, `seed`, `rate`, `result`; `first`, `early`, `final`, `best` success, `area`;
        `collapsed`; `responses` per step; `right_length`, `wrong_length` of the first batch and
        `length_ratio`, wrong to right; `entropy`, `response_length`, mean over the last tenth of
        the budget; `pass@k` after training and `pass@k before`.
    """
    # pandas cannot say which of its types a selection is.
    rows: Any = result.rows
    measured, cell = result.measured, result.cell
    found = measures(measured["step"], measured["success"])
    diverged = result.facts["status"] == "diverged"
    end = rows[rows["step"] > (1 - FINAL_SHARE) * rows["step"].iloc[-1]]
    batch = rows[rows["step"] == 1]
    right, wrong = (_mean(batch, f"response_length_{which}") for which in ("right", "wrong"))
    sampled = rows.dropna(subset="responses_sampled").iloc[-1:]
    chances = [name for name in rows if str(name).startswith("pass@")]
    return {
        "variant": cell["variant"],
        "seed": cell["seed"],
        "rate": cell["training"][TUNED.rpartition(".")[2]],
        "first": float(measured["success"].iloc[0]),
        **found,
        "collapsed": diverged or has_collapsed(found["final"], found["best"]),
        "responses": float((sampled["responses_sampled"] / sampled["step"]).sum()),
        "right_length": right,
        "wrong_length": wrong,
        "length_ratio": wrong / right if right else math.nan,
        **{name: _mean(end, name) for name in _AT_THE_END},
        **{name: float(rows[name].iloc[-1]) for name in chances},
        **{f"{name} before": float(rows[name].iloc[0]) for name in chances},
        "result": result,
    }


def _mean(rows: pd.DataFrame, column: str) -> float:
    return float(rows[column].mean()) if column in rows else math.nan


def _planned_too(plan: Plan, own: Sequence[Result], others: Sequence[Result]) -> list[Result]:
    """Runs of other studies in a regime and with a variant of this plan, measured alike.

    One seed gives the same run in every study, so a run that the study has itself, or that an
    earlier one has lent, is left out.
    """
    if plan.tuned:
        return []
    measured = {plan.regime_of(result.cell): _measured(result.cell["evaluation"]) for result in own}
    found = {_place(plan, result): result for result in own}
    many = len(found)
    for result in others:
        cell, place = result.cell, _place(plan, result)
        asked = measured.get(place[0], _measured(plan.evaluation))
        if (
            place[0] in plan.regimes
            and plan.variants.get(cell["variant"]) == _meaning(cell)
            and _measured(cell["evaluation"]) == asked
            and not result.facts["tuning"]
        ):
            found.setdefault(place, result)
    return list(found.values())[many:]


def _place(plan: Plan, result: Result) -> tuple[Regime, str, int]:
    return plan.regime_of(result.cell), result.cell["variant"], result.cell["seed"]


def _measured(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {key: evaluation[key] for key in _MEASURED_ALIKE}


def _meaning(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {key: cell[key] for key in ("algorithm", "settings")}


def _require_comparable(plan: Plan, results: Sequence[Result]) -> None:
    """Refuse runs of one regime that were measured differently, and one name for two variants."""
    seen: dict[tuple[Any, ...], Any] = {}
    for result in results:
        cell = result.cell
        for where, value in (
            (("evaluation", plan.regime_of(cell)), _measured(cell["evaluation"])),
            (("variants", cell["variant"]), _meaning(cell)),
        ):
            if seen.setdefault(where, value) != value:
                name = cell["variant"] if where[0] == "variants" else "one regime"
                raise ConfigError(
                    f"study {plan.study}: holds runs of {name} with {where[0]} = {seen[where]} and "
                    f"{value}, which cannot be compared; give one of them a folder of its own"
                )
