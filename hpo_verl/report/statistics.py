"""Statistics over seeds, after arXiv 2108.13264, computed by scipy.

A learning curve is reduced to a few measures, and a set of runs to the interquartile mean with a
percentile bootstrap interval of 95 %. Methods share their seeds, so differences are taken seed by
seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 5_000
LEAST_SEEDS = 3
"""Fewer values say next to nothing about their spread: no interval."""
FINAL_SHARE = 0.1
"""Final success is the mean over the measurements in this last share of the budget."""
COLLAPSE_FRACTION = 0.5
"""A run whose final success is below this share of its first one has collapsed."""

MEASURES = {"at_10": "after 10 %", "at_25": "after 25 %", "final": "final", "area": "area"}
"""Names of the measures, and their titles."""


class Interval(NamedTuple):
    """A point estimate with the bounds of its interval; NaN where there are too few runs.

    Numbers, or arrays of one for every measurement of a curve.
    """

    point: Any
    low: Any
    high: Any

    def shown(self, template: str) -> str:
        """The numbers as text, each in a format such as `.3f` or `.1%`."""
        if math.isnan(self.low):
            return format(self.point, template)
        point, low, high = (format(value, template) for value in self)
        return f"{point} [{low}, {high}]"


def measures(steps: ArrayLike, success: ArrayLike) -> dict[str, float]:
    """Reduce a learning curve to its measures; `steps` rise from 0 to the budget.

    Returns:
        `at_10`, `at_25`: success after that per cent of the budget, linear between measurements;
        `final`: mean over the last tenth of the budget; `area`: under the curve, divided by the
        budget.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(success, dtype=float)
    budget = float(x[-1])
    return {
        "at_10": float(np.interp(0.1 * budget, x, y)),
        "at_25": float(np.interp(0.25 * budget, x, y)),
        "final": float(y[x > (1 - FINAL_SHARE) * budget].mean()),
        "area": float(np.trapezoid(y, x) / budget),
    }


def interquartile_mean(values: ArrayLike, axis: int = -1) -> Any:
    """Mean without the lowest and the highest quarter, each rounded down to whole runs."""
    return stats.trim_mean(np.asarray(values, dtype=float), 0.25, axis=axis)


def interval(
    *samples: ArrayLike,
    statistic: Callable[..., Any] = interquartile_mean,
    axis: int = -1,
    seed: int = 0,
) -> Interval:
    """A statistic over seeds with its bootstrap interval; with few seeds it is too narrow.

    Args:
        samples: One value per seed along `axis`; several samples are resampled independently.
        statistic: Takes the samples and an axis.
        axis: Of the seeds.
        seed: Of the resampling.
    """
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    point = statistic(*arrays, axis=axis)
    if min(array.shape[axis] for array in arrays) < LEAST_SEEDS:
        return Interval(point, point * math.nan, point * math.nan)
    found = stats.bootstrap(
        arrays, statistic, n_resamples=RESAMPLES, vectorized=True, axis=axis,
        method="percentile", confidence_level=CONFIDENCE, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(point, found.low, found.high)


def improvement_probability(ours: ArrayLike, theirs: ArrayLike) -> Interval:
    """P(ours > theirs) + P(equal) / 2 of two random runs: Mann-Whitney's U over the pairs.

    Runs of the two methods are resampled independently, as in arXiv 2108.13264.
    """

    def share_better(x: Any, y: Any, axis: int) -> Any:
        return ((np.sign(x[..., :, None] - y[..., None, :]) + 1) / 2).mean(axis=(-2, -1))

    return interval(ours, theirs, statistic=share_better)
