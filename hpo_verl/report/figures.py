"""Figures of runs and of studies, by matplotlib; methods are told apart by place, not by colour."""

from __future__ import annotations

import errno
import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.comparison import Comparison
from hpo_verl.report.statistics import interval
from hpo_verl.runs.files import write_atomically

FORMATS = (".png", ".svg", ".pdf")
COLOUR = "#0072B2"
COLUMNS = 3
_TITLE_WIDTH = 36
STYLE: Any = {
    "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "font.size": 9.0, "axes.titlesize": 9.0,
    "text.parse_math": False, "svg.hashsalt": "hpo_verl", "svg.fonttype": "none",
}  # fmt: skip


def check_picture(path: Path) -> None:
    """Raise ConfigError for a picture of unknown format, or one that cannot be written."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--picture {path}: must end with {', '.join(FORMATS)}")
    try:
        if path.is_dir():
            raise OSError(errno.EISDIR, "is a folder")
        # What the permissions say is not all: a file system may be mounted to be read only.
        with TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        text = f"must be a file in a folder where files can be made ({error.strerror})"
        raise ConfigError(f"--picture {path}: {text}") from error


def draw_curves(curves: Mapping[str, pd.DataFrame], baseline: str, path: Path) -> None:
    """Draw success over steps: a panel per method, with its interquartile mean and interval.

    Args:
        curves: For every method, a row per step and a column per seed.
        baseline: Method whose curve is dashed in the panels of the others, if it is there.
        path: File to write; its ending says the format.
    """
    with mpl.rc_context(STYLE):
        bands = {name: interval(curve, axis=1) for name, curve in curves.items()}
        columns = min(COLUMNS, len(curves))
        rows = math.ceil(len(curves) / columns)
        size = (max(2.5 * columns, 4.0), 0.5 + 1.9 * rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for unused in axes[len(curves) :]:
            unused.set_visible(False)
        for panel, (name, curve) in zip(axes, curves.items(), strict=False):
            if baseline in bands and name != baseline:
                steps = curves[baseline].index
                panel.plot(steps, bands[baseline].point, "--", color="grey", linewidth=1.2)
            point, low, high = bands[name]
            panel.plot(curve.index, point, color=COLOUR)
            if np.isnan(low).all():
                panel.plot(curve.index, curve, "o-", color=COLOUR, linewidth=0.8, alpha=0.4)
            panel.fill_between(curve.index, low, high, color=COLOUR, alpha=0.2, linewidth=0)
            panel.set_title(fill(f"{name} ({curve.shape[1]})", _TITLE_WIDTH))
        figure.supxlabel("step")
        figure.supylabel("success")
        save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, there whole or not at all; raises DataError if it cannot be written."""
    picture = io.BytesIO()
    # Without a date the same runs give the same bytes.
    metadata: Any = {"Date": None} if path.suffix == ".svg" else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(picture, dpi=150, format=path.suffix[1:], metadata=metadata)
    try:
        write_atomically(path, picture.getvalue())
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error


def draw_study(comparison: Comparison, folder: Path) -> list[tuple[Path, str]]:
    """Draw the curves of every regime of a study as SVG; path and caption of each figure."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for number, (regime, variants) in enumerate(comparison.runs.items(), 1):
        curves = {}
        for variant, runs in variants.items():
            success = [result.measured.set_index("step")["success"] for result in runs["result"]]
            curves[variant] = pd.concat(success, axis=1)
        path = folder / f"{comparison.study}-{number}.svg"
        draw_curves(curves, comparison.baseline, path)
        caption = "success on held-out questions, interquartile mean over seeds with 95 % interval"
        text = f"{comparison.title(regime)}: {caption}; dashed: {comparison.baseline}."
        figures.append((path, text))
    return figures
