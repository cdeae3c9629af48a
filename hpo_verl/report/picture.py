"""The picture of a comparison: success over steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure

from hpo_verl.errors import ConfigError
from hpo_verl.report.intervals import LEAST_SEEDS, bootstrap_interval
from hpo_verl.report.runs import Group

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers tell apart; lines and
# markers differ too, for readers without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX"
LABEL_WIDTH = 80


def check_picture(path: Path) -> None:
    """Check that a picture can be written.

    Raises:
        ConfigError: unknown format, or no such folder.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"--picture {path}: must end with {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ConfigError(f"--picture {path}: must be a file in a folder that exists")


def draw(groups: Sequence[Group], path: Path) -> bool:
    """Draw success over steps: a thin line a seed, a thick one for their mean, its interval.

    Args:
        groups: runs by experiment.
        path: file to write; its ending says the format.

    Returns:
        Whether there was anything to draw.

    Raises:
        ConfigError: see `check_picture`.
    """
    check_picture(path)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for position, group in enumerate(groups):
        style = {
            "color": COLOURS[position % len(COLOURS)],
            "linestyle": LINES[position // len(COLOURS) % len(LINES)],
            "marker": MARKERS[position % len(MARKERS)],
            "markersize": 4,
        }
        series = [run.validations for run in group.runs if run.validations[0]]
        if not series:
            continue
        # A mean needs all seeds at a step.
        common = sorted(set.intersection(*(set(steps) for steps, _ in series)))
        at = [dict(zip(steps, values, strict=True)) for steps, values in series]
        columns = [[values[step] for values in at] for step in common]
        for steps, values in series if len(series) > 1 else []:
            axes.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.4)
        label = group.label + (f" ({len(series)} seeds)" if len(series) > 1 else "")
        means = [sum(column) / len(column) for column in columns]
        axes.plot(common, means, label=fill(label, LABEL_WIDTH), **style)
        if len(series) >= LEAST_SEEDS:
            bounds = [bootstrap_interval(column) or (0.0, 0.0) for column in columns]
            low, high = zip(*bounds, strict=True)
            axes.fill_between(common, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if not axes.lines:
        return False
    axes.set_xlabel("step")
    axes.set_ylabel("success rate on held-out prompts")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=150, format=path.suffix[1:])
    os.replace(partial, path)
    return True
