"""Statistics over seeds, after arXiv 2108.13264, computed by scipy.

A learning curve is reduced to a few measures, and a set of runs to the interquartile mean (the
mean without the lowest and the highest quarter) with a percentile bootstrap interval of 95 %.
Where several regimes are pooled, seeds are resampled within each of them (stratified). Methods
share their seeds, so differences are taken seed by seed. A method's probability of improvement
over another is that of a random run of it being better, ties counting half, averaged over regimes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 5_000
LEAST_SEEDS = 3
"""Fewer values say next to nothing about their spread: no interval."""
FINAL_SHARE = 0.1
"""Final success is the mean over the measurements in this last share of the budget."""
COLLAPSE_FRACTION = 0.5
"""A run whose final success is below this share of its first one has collapsed."""

MEASURES = ("at_10", "at_25", "final", "area")


class Interval(NamedTuple):
    """A point estimate with the bounds of its interval; NaN where there are too few runs."""

    point: float
    low: float
    high: float

    def shown(self, template: str) -> str:
        """The numbers as text, each in a format such as `.3f` or `.1%`."""
        if math.isnan(self.low):
            return format(self.point, template)
        point, low, high = (format(value, template) for value in self)
        return f"{point} [{low}, {high}]"


def measures(steps: ArrayLike, success: ArrayLike) -> dict[str, float]:
    """Reduce a learning curve to its measures.

    Args:
        steps: Where success was measured, rising from 0 to the budget.
        success: Fractions.

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


def collapsed(success: ArrayLike, final: float, status: str) -> bool:
    """Whether a run lost half of the success that it began with, or diverged."""
    first = float(np.asarray(success, dtype=float)[0])
    return status == "diverged" or final < COLLAPSE_FRACTION * first


def interquartile_mean(values: ArrayLike, axis: int = -1) -> Any:
    """Mean without the lowest and the highest quarter, each rounded down to whole runs."""
    return stats.trim_mean(np.asarray(values, dtype=float), 0.25, axis=axis)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with its interval; with few seeds the interval is too narrow."""
    return _bootstrap([np.asarray(values, dtype=float)], np.mean, 0)


def interquartile_interval(strata: Sequence[ArrayLike], seed: int = 0) -> Interval:
    """Interquartile mean of the pooled strata with a stratified bootstrap interval.

    Args:
        strata: For every regime, one value per seed.
        seed: Of the resampling.
    """

    def statistic(*samples: Array, axis: int = -1) -> Any:
        return interquartile_mean(np.concatenate(samples, axis=axis), axis=axis)

    return _bootstrap([np.asarray(stratum, dtype=float) for stratum in strata], statistic, seed)


def paired_difference(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> Interval:
    """Interquartile mean of the differences seed by seed; of the same regimes and seeds."""
    pairs = zip(ours, theirs, strict=True)
    return interquartile_interval([np.subtract(np.asarray(a), np.asarray(b)) for a, b in pairs])


def improvement_probability(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> Interval:
    """P(ours > theirs) + P(equal) / 2 of two random runs, averaged over regimes.

    It is the Mann-Whitney statistic U divided by the number of pairs. Runs of the two methods
    are resampled independently, as in arXiv 2108.13264.

    Args:
        ours: For every regime, one value per run.
        theirs: The same of the other method.
    """
    count = len(ours)

    def share_better(x: Array, y: Array) -> Any:
        return ((np.sign(x[..., :, None] - y[..., None, :]) + 1) / 2).mean(axis=(-2, -1))

    def statistic(*samples: Array, axis: int = -1) -> Any:
        pairs = zip(samples[:count], samples[count:], strict=True)
        return np.mean([share_better(x, y) for x, y in pairs], axis=0)

    samples = [np.asarray(values, dtype=float) for values in (*ours, *theirs)]
    return _bootstrap(samples, statistic, 0)


def curve_bands(
    curves: ArrayLike, statistic: Callable[..., Any] = interquartile_mean
) -> tuple[Array, Array, Array]:
    """Statistic over seeds of learning curves, and its interval, measurement by measurement.

    Args:
        curves: `[seeds, measurements]`.
        statistic: Takes an axis.

    Returns:
        Point, low and high, `[measurements]` each.
    """
    return _bootstrap_arrays([np.asarray(curves, dtype=float)], statistic, 0, axis=0)


def _bootstrap(samples: list[Array], statistic: Callable[..., Any], seed: int) -> Interval:
    return Interval(*map(float, _bootstrap_arrays(samples, statistic, seed)))


def _bootstrap_arrays(
    samples: list[Array], statistic: Callable[..., Any], seed: int, axis: int = -1
) -> tuple[Array, Array, Array]:
    point = np.asarray(statistic(*samples, axis=axis))
    if min(sample.shape[axis] for sample in samples) < LEAST_SEEDS:
        return point, np.full_like(point, math.nan), np.full_like(point, math.nan)
    # With several samples scipy resamples each of them by itself: the strata.
    found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, vectorized=True, axis=axis,
        method="percentile", confidence_level=CONFIDENCE, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return point, found.low, found.high
