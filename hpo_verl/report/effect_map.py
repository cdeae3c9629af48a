"""The map: what the weight and the mean length change, over sparsity and over length ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hpo_verl.report.comparison import Comparison
from hpo_verl.report.effects import NOT_RUN
from hpo_verl.report.figures import STYLE, save_figure
from hpo_verl.report.markdown import percent
from hpo_verl.report.regimes import Regime, title
from hpo_verl.report.statistics import CONFIDENCE, LEAST_SEEDS, Effect, summary

SPARSITY, LENGTHS = "sparsity", ("length", "budget")
# Okabe and Ito's colours; place and shape tell the methods apart without them.
_LOOKS = (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#009E73"), ("D", "#CC79A7"), ("v", "#56B4E9"))
_NOT_RUN_COLOUR = "#666666"
# Of two methods at one place; places are 1 apart.
_APART = 0.22
_BY_LENGTH = "wrong answers made longer and longer"


class Point(NamedTuple):
    """One method in one planned regime; `x` is None where nobody has measured it yet."""

    panel: str
    x: float | None
    regime: str
    method: str
    effect: Effect


def methods(sparsity: Comparison) -> list[str]:
    """What the map compares with the baseline: the other variants that the study plans."""
    return [name for name in sparsity.plan.variants if name != sparsity.baseline]


def sparsity_points(study: Comparison) -> list[Point]:
    """Effects over the success of the warm start, a panel for every length of wrong answers."""
    return [
        point._replace(panel=title(regime, ["wrong_length"]), x=dict(regime)["warm_start"])
        for regime in study.plan.regimes
        for point in _points(study, regime, methods(study))
    ]


def length_points(studies: Sequence[Comparison], shown: Sequence[str]) -> list[Point]:
    """Effects of some methods over the measured ratio of wrong to right answers' lengths."""
    return [
        point._replace(x=length_ratio(study, regime))
        for study in studies
        for regime in study.plan.regimes
        for point in _points(study, regime, shown)
    ]


def _points(study: Comparison, regime: Regime, shown: Sequence[str]) -> list[Point]:
    name = study.title(regime)
    return [
        Point(_BY_LENGTH, None, name, method, study.effect(regime, method, study.baseline))
        for method in shown
    ]


def length_ratio(study: Comparison, regime: Regime) -> float | None:
    """Wrong to right answers' length in the first batch, as measured.

    Without runs it is the one that is asked for, if no other regime of the study asks for the same.
    """
    measured = [
        value for runs in study.runs.get(regime, {}).values() for value in runs["length_ratio"]
    ]
    found = summary(measured)
    if found is not None:
        return float(found.point)
    asked = dict(regime)["wrong_length"]
    everywhere = [dict(other)["wrong_length"] for other in study.plan.regimes]
    return asked if everywhere.count(asked) == 1 else None


def draw_map(sparsity: Comparison, lengths: Sequence[Comparison], path: Path) -> None:
    """Draw the map into a file whose ending says the format; the same runs give the same bytes."""
    shown = methods(sparsity)
    looks = dict(zip(shown, _LOOKS, strict=False))
    points = [*sparsity_points(sparsity), *length_points(lengths, shown)]
    panels = list(dict.fromkeys(point.panel for point in points))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels), 4.0), layout="constrained")
        axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, panel in zip(axes, panels, strict=True):
            axis.axhline(0, color="black", linewidth=0.8)
            _draw_panel(axis, [point for point in points if point.panel == panel], looks)
            axis.set_title(fill(panel, 44))
        axes[0].set_ylabel(f"area under the curve, minus {sparsity.baseline}'s")
        handles = [
            Line2D([], [], color=colour, marker=marker, label=method)
            for method, (marker, colour) in looks.items()
        ]
        if any(point.effect.difference is None for point in points):
            handles.append(
                Line2D([], [], color=_NOT_RUN_COLOUR, marker="x", linestyle="", label=NOT_RUN)
            )
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )
        save_figure(figure, path)


def _draw_panel(axis: Any, points: Sequence[Point], looks: Mapping[str, tuple[str, str]]) -> None:
    # In order and evenly, not to scale: ratios of two studies may lie close together.
    places = sorted({point.x for point in points if point.x is not None})
    for point in points:
        if point.x is None:
            continue
        marker, colour = looks[point.method]
        # Side by side, about their place.
        aside = [*looks].index(point.method) - (len(looks) - 1) / 2
        x = places.index(point.x) + _APART * aside
        found = point.effect.difference
        if found is None:
            axis.plot([x], [0.0], "x", color=_NOT_RUN_COLOUR, markersize=5)
        elif point.effect.pairs < LEAST_SEEDS:
            axis.plot([x], [found.point], marker, color=colour, markerfacecolor="none")
        else:
            # Of equal differences the mean may lie beyond both bounds, by rounding.
            error = [[max(found.point - found.low, 0.0)], [max(found.high - found.point, 0.0)]]
            axis.errorbar(
                [x], [found.point], error, fmt=marker, color=colour, capsize=2, markersize=5
            )
    unplaced = dict.fromkeys(point.regime for point in points if point.x is None)
    if unplaced:
        text = fill(f"{NOT_RUN}: {'; '.join(unplaced)}", 40)
        axis.text(0.02, 0.98, text, transform=axis.transAxes, va="top", fontsize=7)
    by_length = points[0].panel == _BY_LENGTH
    shown = [f"{place:.2f}" if by_length else f"{100 * place:g} %" for place in places]
    axis.set_xticks(range(len(places)), shown)
    axis.set_xlabel(
        "wrong / right answers' length, first batch" if by_length else "warm start's success"
    )


def caption(sparsity: Comparison, lengths: Sequence[Comparison]) -> str:
    """What the map shows, and which of its planned points nobody has run."""
    points = [*sparsity_points(sparsity), *length_points(lengths, methods(sparsity))]
    counts = sorted({point.effect.pairs for point in points if point.effect.pairs})
    pairs = " to ".join(str(count) for count in dict.fromkeys(counts[:1] + counts[-1:])) or "no"
    lacking = [point for point in points if not point.effect.pairs]
    names = " and ".join(f"`{study.study}`" for study in lengths)
    others = ", the others are marked as not run" if lacking else ""
    return (
        f"What each method changes against `{sparsity.baseline}`: difference of the areas under "
        f"the curves of success, interquartile mean over seeds with its {percent(CONFIDENCE)} "
        "interval; an open mark "
        f"has fewer than {LEAST_SEEDS} pairs, hence no interval. Studies `{sparsity.study}` (by "
        f"the warm start's success), and {names} (by the measured ratio of lengths), in order, not "
        "to scale; "
        f"{pairs} pairs a point. {len(points) - len(lacking)} of {len(points)} planned points were "
        f"run{others}."
    )
