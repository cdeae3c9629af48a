"""Figures of runs and of studies, by matplotlib.

Methods are told apart by place, line or marker too, never by colour alone; the colours are those
of Okabe and Ito.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from hpo_verl.errors import ConfigError
from hpo_verl.report.runs import Group
from hpo_verl.report.statistics import curve_bands
from hpo_verl.report.studies import Comparison, Regime

FORMATS = (".png", ".svg", ".pdf")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX"
LABEL_WIDTH = 80
COLUMNS = 3
_STYLE: Any = {
    "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "font.size": 9.0, "axes.titlesize": 9.0, "legend.frameon": False,
    "svg.hashsalt": "hpo_verl", "svg.fonttype": "none",
}  # fmt: skip
_TITLES = {
    "final": "final success",
    "area": "area under the curve",
    "at_10": "after 10 %",
    "at_25": "after 25 %",
}


def check_picture(path: Path) -> None:
    """Check that a picture can be written.

    Raises:
        ConfigError: Unknown format, or no such folder.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"--picture {path}: must end with {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ConfigError(f"--picture {path}: must be a file in a folder that exists")


def draw_runs(groups: Sequence[Group], path: Path) -> bool:
    """Draw success over steps: a thin line a seed, a thick one for their mean, its interval.

    Args:
        groups: Runs by experiment.
        path: File to write; its ending says the format.

    Returns:
        Whether there was anything to draw.

    Raises:
        ConfigError: See `check_picture`.
    """
    check_picture(path)

    def draw() -> Figure | None:
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        for position, group in enumerate(groups):
            style = {
                "color": COLOURS[position % len(COLOURS)],
                "linestyle": LINES[position // len(COLOURS) % len(LINES)],
                "marker": MARKERS[position % len(MARKERS)],
                "markersize": 4,
            }
            curves = [pd.Series(y, x) for x, y in (run.validations for run in group.runs) if x]
            if not curves:
                continue
            label = group.label + (f" ({len(curves)} seeds)" if len(curves) > 1 else "")
            # A mean needs all seeds at a step.
            common = pd.concat(curves, axis=1, join="inner").sort_index()
            if len(curves) > 1:
                for curve in curves:
                    axes.plot(curve.index, curve, color=style["color"], linewidth=0.8, alpha=0.4)
            band = curve_bands(common.T, np.mean)
            _plot_band(axes, common.index, band, label=fill(label, LABEL_WIDTH), **style)
        if not axes.lines:
            return None
        axes.set(xlabel="step", ylabel="success rate on held-out prompts")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", fontsize="small")
        return figure

    return _save(draw, path)


def draw_study(comparison: Comparison, folder: Path) -> list[tuple[Path, str]]:
    """Draw every figure that the runs of a study have something for, as SVG.

    Args:
        comparison: The study.
        folder: Made if missing.

    Returns:
        Path and caption of each figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: list[tuple[Path, str]] = []
    for regime in comparison.regimes:
        for kind, draw, caption in (
            ("curves", _curves, "success on held-out questions, interquartile mean over seeds with "
             f"95 % interval; dashed: {comparison.baseline}"),
            ("intervals", _intervals, "interquartile mean over seeds with 95 % interval; the "
             f"vertical line is {comparison.baseline}"),
        ):  # fmt: skip
            name = f"{comparison.study}-{regime.task}-{regime.warm_start:g}-{kind}.svg"
            if _save(lambda draw=draw, regime=regime: draw(comparison, regime), folder / name):
                figures.append((folder / name, f"{regime.title}: {caption}."))
    return figures


def _save(draw: Callable[[], Figure | None], path: Path) -> bool:
    with mpl.rc_context(_STYLE):
        figure = draw()
        if figure is None:
            return False
        partial = path.with_name(f".{path.name}")
        # Without a date the same runs give the same bytes.
        metadata: Any = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(partial, dpi=150, format=path.suffix[1:], metadata=metadata)
    os.replace(partial, path)
    return True


def _plot_band(axes: Axes, x: ArrayLike, band: Sequence[ArrayLike], **style: Any) -> None:
    point, low, high = map(np.asarray, band)
    (line,) = axes.plot(x, point, **style)
    axes.fill_between(np.asarray(x), low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _curves(comparison: Comparison, regime: Regime) -> Figure:
    names = comparison.present(regime)
    curves = {
        name: [result.measured for result in comparison.of(regime, name)["result"]]
        for name in names
    }
    bands = {name: curve_bands([c["success"] for c in curves[name]]) for name in names}
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(7.5, 0.5 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True).flatten()
    for unused in axes[len(names) :]:
        unused.set_visible(False)
    for panel, name in zip(axes, names, strict=False):
        steps = curves[name][0]["step"]
        if comparison.baseline in bands and name != comparison.baseline:
            panel.plot(steps, bands[comparison.baseline][0], "--", color="grey", linewidth=1.2)
        _plot_band(panel, steps, bands[name])
        panel.set_title(f"{name} ({len(curves[name])})")
    figure.supxlabel("step")
    figure.supylabel("success")
    return figure


def _intervals(comparison: Comparison, regime: Regime) -> Figure:
    rows = comparison.rows([regime])
    places = np.arange(len(rows))[::-1]
    figure = Figure(figsize=(9.0, 0.9 + 0.28 * len(rows)), layout="constrained")
    for panel, (name, title) in zip(
        figure.subplots(1, len(_TITLES), sharey=True), _TITLES.items(), strict=True
    ):
        for place, row in zip(places, rows, strict=True):
            point, low, high = row.measures[name]
            if row.variant == comparison.baseline:
                panel.axvline(point, color="grey", linewidth=1)
            panel.plot([low, high], [place, place], color=COLOURS[0], linewidth=3, alpha=0.5)
            panel.plot([point], [place], "o", color=COLOURS[0], markersize=4)
        panel.set_yticks(places, [row.variant for row in rows])
        panel.set_title(title)
    return figure
