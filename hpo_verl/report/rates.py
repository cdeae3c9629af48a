"""Learning rates: those that were chosen, and the largest at which a variant is stable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpo_verl.config.studies import TUNED
from hpo_verl.report.comparison import Comparison
from hpo_verl.report.effects import NOT_RUN
from hpo_verl.report.markdown import markdown_table
from hpo_verl.report.regimes import Regime, title, varying


def chosen_rates(comparison: Comparison) -> str:
    """Markdown of a tuned study: mean area by rate on the seeds set aside, and the best rate."""
    grid = sorted({rate for areas in comparison.tried.values() for rate in areas})
    rows: list[dict[str, Any]] = []
    for regime in comparison.regimes:
        for variant in comparison.variants:
            areas = comparison.tried.get((regime, variant))
            if areas is None:
                continue
            row: dict[str, Any] = {"regime": comparison.title(regime), "method": f"`{variant}`"}
            row |= {f"area at {rate:g}": _mean(areas, rate) for rate in grid}
            best = comparison.rates[regime, variant]
            row["best rate"] = format(best, "g")
            # What lies beyond the end of a grid may be better still.
            row["at the grid's end"] = "yes" if best in (grid[0], grid[-1]) else "no"
            row["seeds"] = min(map(len, areas.values()))
            rows.append(row)
    return markdown_table(rows) or NOT_RUN


def stable_rates(comparison: Comparison) -> str:
    """Markdown of a study that crosses rates: collapsed runs at each, and the largest stable one.

    That is the largest rate up to which no run of the variant collapsed; the true one may be larger
    where the rates beyond it were not run.
    """
    found: dict[tuple[Regime, str], dict[float, tuple[int, int]]] = {}
    for regime, variants in comparison.runs.items():
        rest = tuple(item for item in regime if item[0] != TUNED)
        for variant, runs in variants.items():
            counts = int(runs["collapsed"].sum()), len(runs)
            found.setdefault((rest, variant), {})[dict(regime)[TUNED]] = counts
    grid = sorted({dict(regime)[TUNED] for regime in comparison.regimes})
    keys = varying([regime for regime, _ in found])
    rows = [
        {
            "regime": title(regime, keys),
            "method": f"`{variant}`",
            **{f"{rate:g}": _share(counts.get(rate)) for rate in grid},
            "stable up to": _stable(counts, grid),
        }
        for (regime, variant), counts in found.items()
    ]
    return markdown_table(rows) or NOT_RUN


def _stable(counts: Mapping[float, tuple[int, int]], grid: Sequence[float]) -> str:
    stable = None
    for rate, (collapsed, _) in sorted(counts.items()):
        if collapsed:
            break
        stable = rate
    if stable is None:
        return "none of them"
    beyond = [rate for rate in grid if rate > stable]
    unknown = beyond and beyond[0] not in counts
    return f"{stable:g} at least" if unknown else format(stable, "g")


def _share(counts: tuple[int, int] | None) -> str:
    return NOT_RUN if counts is None else f"{counts[0]} of {counts[1]}"


def _mean(areas: Mapping[float, list[float]], rate: float) -> float | str:
    found = areas.get(rate)
    return sum(found) / len(found) if found else NOT_RUN
