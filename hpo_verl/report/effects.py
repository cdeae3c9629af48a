"""Tables of a study: what its regimes begin with, and what every variant changes in each."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pandas as pd

from hpo_verl.report.comparison import COMPARED, Comparison
from hpo_verl.report.markdown import markdown_table, names, percent, signed
from hpo_verl.report.regimes import Regime
from hpo_verl.report.statistics import (
    COLLAPSE_FRACTION,
    COLLAPSE_POINTS,
    CONFIDENCE,
    EARLY_SHARE,
    FINAL_SHARE,
    LEAST_SEEDS,
    RESAMPLES,
    Effect,
    Interval,
    summary,
)

NOT_RUN = "not run"
TERMS = f"""- **Numbers** are interquartile means over seeds with {percent(CONFIDENCE)} percentile
  bootstrap intervals ({RESAMPLES} resamples, arXiv 2108.13264), computed with scipy. A difference
  is taken seed by seed: one seed sets warm start, questions and sampling. Two runs that did not
  begin with the same policy, since another machine made another warm start, are no pair: its
  SHA-256 tells, and in older runs, which lack it, its success, measured twice.
- **Area** is under the curve of success on held-out questions, divided by the budget. **Early**:
  success after {percent(EARLY_SHARE)} of the budget. **At the end**: mean over its last
  {percent(FINAL_SHARE)}; so are entropy and tokens of a response.
- **Collapsed**: the run diverged, or its success at the end is below {percent(COLLAPSE_FRACTION)}
  of the best that it had, and {100 * COLLAPSE_POINTS:.0f} percentage points below it. Such runs
  are in every number.
- **Wrong answers short**: as short as the task has them; 4 x: made four times as long as an
  average right one. The measured ratio, of the first batch, differs: some long ones are right.
- **Responses** are sampled per step. Fewer than {LEAST_SEEDS} pairs have no interval."""


def study_text(comparison: Comparison, planned: bool = True) -> str:
    """Markdown of a study: its setting, its regimes, and its effects.

    Args:
        comparison: The study.
        planned: Whether to name what the study's file plans and nobody has run.
    """
    if not comparison.runs:
        return NOT_RUN
    beginnings = [_beginning(comparison, regime) for regime in comparison.runs]
    rows = [
        row for regime in comparison.regimes for row in effect_rows(comparison, regime, planned)
    ]
    parts = [setting(comparison), markdown_table(beginnings), markdown_table(rows)]
    return "\n\n".join(part for part in parts if part)


def setting(comparison: Comparison) -> str:
    """How the runs of a study trained and were measured, in a sentence."""
    results = [*comparison.results, *comparison.lent]
    training = [result.cell["training"] for result in results]
    evaluation = [result.cell["evaluation"] for result in results]
    seeds = {result.cell["seed"] for result in results}
    lenders = Counter(result.cell["study"] for result in comparison.lent)
    lent = "".join(f", {many} of them of `{study}`" for study, many in lenders.items())

    def values(sections: list[dict[str, Any]], key: str, template: str = "") -> str:
        found = sorted({section[key] for section in sections})
        return ", ".join(format(value, template) for value in found)

    return (
        f"{len(results)} runs{lent}, seeds: {len(seeds)}; {values(training, 'steps')} steps "
        f"of {values(training, 'prompts_per_step')} x {values(training, 'responses_per_prompt')} "
        f"responses in {values(training, 'mini_batches')} mini-batches, passes: "
        f"{values(training, 'epochs')}, AdamW at {values(training, 'learning_rate', 'g')}; success "
        f"on {values(evaluation, 'questions')} held-out questions every "
        f"{values(evaluation, 'every')} steps."
    )


def effect_rows(
    comparison: Comparison, regime: Regime, planned: bool = True
) -> list[dict[str, Any]]:
    """Rows of a regime, one per variant; where `planned`, one more for those without a run."""
    baseline, heading = comparison.baseline, comparison.title(regime)
    rows: list[dict[str, Any]] = []
    for variant, runs in comparison.runs.get(regime, {}).items():
        row: dict[str, Any] = {"regime": heading, "method": f"`{variant}`"}
        if comparison.plan.tuned:
            row["rate"] = format(comparison.rates[regime, variant], "g")
        row |= {"runs": len(runs), "collapsed": int(runs["collapsed"].sum())}
        other = variant != baseline
        row["success at the end"] = summary(runs["final"])
        for measure in (COMPARED, "early"):
            row[f"{measure} - {baseline}"] = (
                effect_text(comparison.effect(regime, variant, baseline, measure))
                if other
                else None
            )
        row["pairs"] = comparison.effect(regime, variant, baseline).pairs if other else None
        if largest := _largest_chance(runs):
            row[largest] = summary(runs[largest])
            row[f"{largest} - {baseline}"] = (
                effect_text(comparison.effect(regime, variant, baseline, largest))
                if other
                else None
            )
        row["entropy"] = _point(runs["entropy"], ".3f")
        row["tokens"] = _point(runs["response_length"], ".1f")
        row["responses"] = _point(runs["responses"], ".0f")
        rows.append(row)
    if planned and regime in comparison.plan.regimes and (lacking := comparison.lacking(regime)):
        which = "all" if len(lacking) == len(comparison.plan.variants) else names(lacking)
        rows.append({"regime": heading, "method": which, "runs": NOT_RUN})
    return rows


def effect_text(found: Effect) -> str:
    """An effect in a table's cell; what too few pairs say is told as that."""
    if found.difference is None:
        return NOT_RUN
    if found.pairs < LEAST_SEEDS:
        plural = "s" if found.pairs > 1 else ""
        return f"{found.difference.point:+.3f} ({found.pairs} pair{plural} only)"
    return signed(found.difference)


def _beginning(comparison: Comparison, regime: Regime) -> dict[str, Any]:
    runs = pd.concat(list(comparison.runs[regime].values()))
    # All variants of a seed begin alike; one that diverged at once has no batch.
    first = runs[["first", "right_length", "wrong_length", "length_ratio"]].groupby(level=0).first()
    return {
        "regime": comparison.title(regime),
        "success before": _points(summary(first["first"]), ".1%"),
        "tokens, right": _point(first["right_length"], ".1f"),
        "tokens, wrong": _point(first["wrong_length"], ".1f"),
        "wrong / right": _points(summary(first["length_ratio"]), ".2f"),
    }


def _largest_chance(runs: pd.DataFrame) -> str | None:
    """The column `pass@k` of the largest k that some run has."""
    found = {
        int(name[5:]): name
        for name in map(str, runs.columns)
        if re.fullmatch(r"pass@\d+", name) and runs[name].notna().any()
    }
    return found[max(found)] if found else None


def _point(values: Any, template: str) -> str | None:
    found = summary(values)
    return None if found is None else format(found.point, template)


def _points(value: Interval | None, template: str) -> str | None:
    return None if value is None else value.shown(template)
