"""The report's pictures, each for light and for dark pages, as SVG and PNG.

Methods are told apart by their place or their line style, never by colour alone; the colours are
those of Okabe and Ito, lighter ones on dark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpo_verl.lab.comparison import BASELINE, Comparison, Regime, Run
from hpo_verl.lab.statistics import Interval, curve_bands

COLUMNS = 3
_TITLES = {
    "final": "final success",
    "area": "area under the curve",
    "at_10": "after 10 %",
    "at_25": "after 25 %",
    "at_50": "after 50 %",
}


@dataclass(frozen=True)
class Theme:
    """Colours of a page: text, background, baseline, the method itself, a second line."""

    name: str
    text: str
    background: str
    baseline: str
    method: str
    second: str


LIGHT = Theme("light", "#1a1a1a", "#ffffff", "#767676", "#0072B2", "#D55E00")
DARK = Theme("dark", "#e6e6e6", "#161616", "#a0a0a0", "#56B4E9", "#E69F00")
THEMES = (LIGHT, DARK)


class Picture(NamedTuple):
    """A drawn picture.

    Attributes:
        name: Stem of its files, `<name>-<theme>.svg` and `.png`.
        caption: What it shows.
        svg: Path by theme.
    """

    name: str
    caption: str
    svg: dict[str, Path]


def draw_all(comparison: Comparison, folder: Path) -> list[Picture]:
    """Draw every picture that the runs of a study have something for."""
    pictures = []
    for name, caption, draw in _plans(comparison):
        paths = {
            theme.name: _save(draw, theme, folder / f"{name}-{theme.name}") for theme in THEMES
        }
        pictures.append(Picture(name, caption, paths))
    return pictures


Draw = Callable[[Theme], Figure]


def _plans(comparison: Comparison) -> Iterator[tuple[str, str, Draw]]:
    study = comparison.study
    for regime in comparison.regimes:
        stem = f"{study}-{regime.task}-{regime.warm_start:g}"
        yield (
            f"{stem}-curves",
            f"{regime.title}: success on held-out questions, interquartile mean over seeds with "
            f"95 % interval; dashed: {BASELINE}.",
            _bind(_curves, comparison, regime),
        )
        yield (
            f"{stem}-intervals",
            f"{regime.title}: interquartile mean over seeds with 95 % interval; the vertical line "
            f"is {BASELINE}.",
            _bind(_intervals, comparison, [regime]),
        )
        yield (
            f"{stem}-batches",
            f"{regime.title}: entropy of the policy (nats per token), and mean length of responses "
            "with positive (solid) and negative (dashed) advantage (tokens); mean over seeds.",
            _bind(_batches, comparison, regime),
        )
        adaptive = [v for v in comparison.variants if _is_adaptive(comparison.runs(regime, v))]
        if adaptive:
            yield (
                f"{stem}-alpha",
                f"{regime.title}: the weight alpha and the success rate of the batch over time, "
                "and one against the other, a line per seed.",
                _bind(_alpha, comparison, regime, adaptive),
            )
        fixed = _fixed_alphas(comparison, regime)
        if len(fixed) > 2:
            yield (
                f"{stem}-ablation",
                f"{regime.title}: success by fixed alpha, interquartile mean with 95 % interval; "
                "the band is the adaptive rule.",
                _bind(_ablation, comparison, regime, fixed),
            )
    if any(row.differences for row in comparison.rows(comparison.regimes)):
        yield (
            f"{study}-differences",
            f"All regimes: paired difference from {BASELINE} (interquartile mean over seeds) and "
            "probability of improvement over it, with stratified 95 % intervals.",
            _bind(_differences, comparison),
        )


def _bind(draw: Callable[..., Figure], *arguments: Any) -> Draw:
    return lambda theme: draw(theme, *arguments)


def _save(draw: Draw, theme: Theme, stem: Path) -> Path:
    settings: dict[Any, Any] = {
        "figure.facecolor": theme.background, "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background, "text.color": theme.text,
        "axes.labelcolor": theme.text, "axes.edgecolor": theme.text, "xtick.color": theme.text,
        "ytick.color": theme.text, "grid.color": theme.baseline, "grid.alpha": 0.3,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "font.size": 9.0, "axes.titlesize": 9.0,
        "legend.frameon": False, "svg.hashsalt": "hpo_verl", "svg.fonttype": "none",
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = draw(theme)
        svg = stem.with_name(f"{stem.name}.svg")
        figure.savefig(svg, metadata={"Date": None})
        # The layout that was found for one file serves the other.
        figure.set_layout_engine("none")
        figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=150)
    return svg


def _panels(count: int, height: float = 1.9, **options: Any) -> tuple[Figure, list[Axes]]:
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(7.5, 0.5 + height * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False, **options).flatten().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def _present(comparison: Comparison, regime: Regime) -> list[str]:
    return [name for name in comparison.variants if comparison.runs(regime, name)]


def _curves(theme: Theme, comparison: Comparison, regime: Regime) -> Figure:
    names = _present(comparison, regime)
    bands = {name: _band(comparison.runs(regime, name)) for name in names}
    figure, axes = _panels(len(names), sharex=True, sharey=True)
    for panel, name in zip(axes, names, strict=True):
        if BASELINE in bands and name != BASELINE:
            steps, point, _, _ = bands[BASELINE]
            panel.plot(steps, point, color=theme.baseline, linestyle="--", linewidth=1.2)
        steps, point, low, high = bands[name]
        panel.plot(steps, point, color=theme.method, linewidth=1.6)
        panel.fill_between(steps, low, high, color=theme.method, alpha=0.25, linewidth=0)
        panel.set_title(f"{name} ({len(comparison.runs(regime, name))})")
    figure.supxlabel("step")
    figure.supylabel("success")
    return figure


def _band(runs: list[Run]) -> tuple[NDArray[np.float64], ...]:
    steps, _ = runs[0].measured()
    return (steps, *curve_bands([run.measured()[1] for run in runs]))


def _intervals(theme: Theme, comparison: Comparison, regimes: Sequence[Regime]) -> Figure:
    rows = comparison.rows(regimes)
    figure = Figure(figsize=(9.0, 0.9 + 0.28 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(_TITLES), sharey=True)
    for panel, (name, title) in zip(panels, _TITLES.items(), strict=True):
        for row in rows:
            if row.variant == BASELINE:
                panel.axvline(row.measures[name].point, color=theme.baseline, linewidth=1)
        _forest(theme, panel, [(row.variant, row.measures[name]) for row in rows])
        panel.set_title(title)
    return figure


def _differences(theme: Theme, comparison: Comparison) -> Figure:
    rows = [row for row in comparison.rows(comparison.regimes) if row.differences]
    figure = Figure(figsize=(9.0, 0.9 + 0.28 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for panel, name in zip(panels[:2], ("final", "area"), strict=True):
        panel.axvline(0.0, color=theme.baseline, linewidth=1)
        _forest(theme, panel, [(row.variant, row.differences[name]) for row in rows])
        panel.set_title(f"{_TITLES[name]},\ndifference")
    for panel, name in zip(panels[2:], ("final", "area"), strict=True):
        panel.axvline(0.5, color=theme.baseline, linewidth=1)
        _forest(theme, panel, [(row.variant, row.improvement[name]) for row in rows])
        panel.set_xlim(-0.02, 1.02)
        panel.set_title(f"P(better),\n{_TITLES[name]}")
    return figure


def _forest(theme: Theme, panel: Axes, rows: Sequence[tuple[str, Interval]]) -> None:
    places = np.arange(len(rows))[::-1]
    for place, (_, interval) in zip(places, rows, strict=True):
        panel.plot(
            [interval.low, interval.high], [place, place],
            color=theme.method, linewidth=3, alpha=0.5, solid_capstyle="butt",
        )  # fmt: skip
        panel.plot([interval.point], [place], "o", color=theme.method, markersize=4)
    panel.set_yticks(places, [name for name, _ in rows])
    panel.set_ylim(-0.6, len(rows) - 0.4)


def _batches(theme: Theme, comparison: Comparison, regime: Regime) -> Figure:
    names = _present(comparison, regime)
    figure, axes = _panels(len(names), sharex=True, sharey=True)
    others = []
    for panel, name in zip(axes, names, strict=True):
        runs = comparison.runs(regime, name)
        steps = _steps(runs)
        panel.plot(steps, _mean(runs, "entropy"), color=theme.second, linewidth=1.2)
        panel.set_title(name)
        panel.tick_params(axis="y", colors=theme.second)
        other = panel.twinx()
        other.grid(False)
        others.append(other)
        for sign, style in (("positive", "-"), ("negative", "--")):
            length = _mean(runs, f"response_length_{sign}")
            # 0 stands for "no such response in the batch".
            length = np.where(length > 0, length, np.nan)
            other.plot(steps, length, color=theme.method, linestyle=style, linewidth=1.2)
        other.tick_params(axis="y", colors=theme.method)
    top = max(other.get_ylim()[1] for other in others)
    for other in others:
        other.set_ylim(0, top)
    figure.supxlabel("step")
    figure.supylabel("entropy (left), length (right)")
    return figure


def _alpha(theme: Theme, comparison: Comparison, regime: Regime, names: list[str]) -> Figure:
    figure = Figure(figsize=(7.5, 0.4 + 2.1 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    for (over_time, against), name in zip(panels, names, strict=True):
        runs = comparison.runs(regime, name)
        steps = _steps(runs)
        over_time.plot(steps, _mean(runs, "alpha"), color=theme.method, label="alpha")
        over_time.plot(
            steps, _mean(runs, "solve_rate"), color=theme.second, linestyle="--",
            label="success rate of the batch",
        )  # fmt: skip
        over_time.set_ylim(-0.02, 1.05)
        over_time.set_title(name)
        over_time.set_xlabel("step")
        over_time.legend(fontsize=7)
        for run in runs:
            columns = run.result.columns
            against.plot(columns["solve_rate"], columns["alpha"], color=theme.method, alpha=0.4,
                         linewidth=0.8)  # fmt: skip
        against.set_ylim(-0.02, 1.05)
        against.set_xlabel("success rate of the batch")
        against.set_ylabel("alpha")
    return figure


def _ablation(
    theme: Theme, comparison: Comparison, regime: Regime, fixed: dict[str, float]
) -> Figure:
    rows = {row.variant: row for row in comparison.rows([regime])}
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, name in zip(panels, ("final", "area", "at_25"), strict=True):
        if (adaptive := rows.get("a_hpo")) is not None:
            interval = adaptive.measures[name]
            panel.axhline(interval.point, color=theme.second, linestyle="--")
            panel.axhspan(interval.low, interval.high, color=theme.second, alpha=0.2, linewidth=0)
        chosen = sorted(fixed.items(), key=lambda item: item[1])
        alphas = [alpha for _, alpha in chosen]
        intervals = [rows[variant].measures[name] for variant, _ in chosen]
        for alpha, interval in zip(alphas, intervals, strict=True):
            panel.plot([alpha, alpha], [interval.low, interval.high], color=theme.method,
                       linewidth=3, alpha=0.5)  # fmt: skip
        panel.plot(alphas, [i.point for i in intervals], "o-", color=theme.method, markersize=4)
        panel.set_title(_TITLES[name])
        panel.set_xlabel("alpha")
    return figure


def _is_adaptive(runs: list[Run]) -> bool:
    return bool(runs) and runs[0].result.cell["algorithm"] == "a_hpo"


def _fixed_alphas(comparison: Comparison, regime: Regime) -> dict[str, float]:
    """Variants of HPO that differ from its recipe in alpha alone."""
    key = "algorithm.hpo.alpha"
    found = {}
    for name in _present(comparison, regime):
        cell = comparison.runs(regime, name)[0].result.cell
        if cell["algorithm"] == "hpo" and set(cell["settings"]) == {key}:
            found[name] = float(cell["settings"][key])
    return found


def _steps(runs: list[Run]) -> NDArray[np.float64]:
    return np.asarray(runs[0].result.columns["step"])


def _mean(runs: list[Run], name: str) -> NDArray[np.float64]:
    """Mean over the runs that have a value, step by step; NaN where none has."""
    values = np.array([run.result.columns[name] for run in runs], dtype=float)
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    total = np.where(there, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
