"""Statistics over seeds, after arXiv 2108.13264, computed by scipy.

A run is reduced to a few measures; a set of runs to the interquartile mean (the mean without
the lowest and the highest quarter) with a percentile bootstrap interval of 95 %. Where several
regimes are pooled, seeds are resampled within each of them (stratified). Methods share their
seeds, so differences are taken seed by seed and their seeds are resampled together. A method's
probability of improvement over another is that of a random run of it being better, ties counting
half, averaged over regimes.
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
EARLY = (0.1, 0.25, 0.5)
"""Shares of the budget after which success is read."""
FINAL_SHARE = 0.1
"""Final success is the mean over the measurements in this last share of the budget."""
THRESHOLD_FACTOR = 2.0
"""The threshold, in units of the warm start's success."""
COLLAPSE_FRACTION = 0.5
"""A run whose final success is below this share of its first one has collapsed."""

MEASURES = ("final", "area", "at_10", "at_25", "at_50", "steps_to_threshold")


class Interval(NamedTuple):
    """A point estimate with the bounds of its interval; NaN where there are too few runs."""

    point: float
    low: float
    high: float


def shown(interval: Interval | None, digits: int) -> str:
    """A number with its interval, as text; empty without a number."""
    if interval is None:
        return ""
    if math.isnan(interval.low):
        return f"{interval.point:.{digits}f}"
    return f"{interval.point:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def measures(steps: ArrayLike, success: ArrayLike, threshold: float) -> dict[str, float]:
    """Reduce a learning curve to its measures.

    Args:
        steps: Where success was measured, rising from 0 to the budget.
        success: Fractions.
        threshold: Success to be reached.

    Returns:
        `final`: mean over the last tenth of the budget; `area`: under the curve, divided by the
        budget; `at_10`, `at_25`, `at_50`: success after that per cent of the budget, linear
        between measurements; `steps_to_threshold`: first crossing, linear between
        measurements, and the budget itself where it is not reached; `reached`: 1.0 or 0.0.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(success, dtype=float)
    budget = x[-1]
    above = np.flatnonzero(y >= threshold)
    crossing = float(budget)
    if len(above):
        i = int(above[0])
        crossing = float(x[i])
        if i > 0:
            crossing -= float((y[i] - threshold) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))
    return {
        "final": float(y[x > (1 - FINAL_SHARE) * budget].mean()),
        "area": float(np.trapezoid(y, x) / budget),
        **{
            f"at_{share:.0%}".rstrip("%"): float(np.interp(share * budget, x, y)) for share in EARLY
        },
        "steps_to_threshold": crossing,
        "reached": float(len(above) > 0),
    }


def collapsed(success: ArrayLike, final: float, status: str) -> bool:
    """Whether a run lost half of the success that it began with, or diverged."""
    first = float(np.asarray(success, dtype=float)[0])
    return status == "diverged" or final < COLLAPSE_FRACTION * first


def interquartile_mean(values: ArrayLike, axis: int = -1) -> Any:
    """Mean without the lowest and the highest quarter, each rounded down to whole runs."""
    return stats.trim_mean(np.asarray(values, dtype=float), 0.25, axis=axis)


def interquartile_interval(strata: Sequence[ArrayLike], seed: int = 0) -> Interval:
    """Interquartile mean of the pooled strata with a stratified bootstrap interval.

    Args:
        strata: For every regime, one value per seed.
        seed: Of the resampling.
    """

    def statistic(*samples: Array, axis: int = -1) -> Any:
        return interquartile_mean(np.concatenate(samples, axis=axis), axis=axis)

    return _bootstrap([np.asarray(stratum, dtype=float) for stratum in strata], statistic, seed)


def paired_difference(
    ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike], seed: int = 0
) -> Interval:
    """Interquartile mean of the differences seed by seed, with its interval.

    Args:
        ours: For every regime, one value per seed.
        theirs: The same regimes and seeds of the baseline.
        seed: Of the resampling.
    """
    differences = [np.asarray(a, float) - np.asarray(b, float) for a, b in _pairs(ours, theirs)]
    return interquartile_interval(differences, seed)


def improvement_probability(
    ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike], seed: int = 0
) -> Interval:
    """P(ours > theirs) + P(equal) / 2 of two random runs, averaged over regimes.

    It is the Mann-Whitney statistic U divided by the number of pairs. Runs of the two methods
    are resampled independently, as in arXiv 2108.13264.

    Args:
        ours: For every regime, one value per run.
        theirs: The same of the other method.
        seed: Of the resampling.
    """
    count = len(ours)

    def statistic(*samples: Array, axis: int = -1) -> Any:
        pairs = zip(samples[:count], samples[count:], strict=True)
        return np.mean([_share_better(x, y) for x, y in pairs], axis=0)

    samples = [np.asarray(values, dtype=float) for values in (*ours, *theirs)]
    return _bootstrap(samples, statistic, seed)


def curve_bands(curves: ArrayLike, seed: int = 0) -> tuple[Array, Array, Array]:
    """Interquartile mean and pointwise interval of learning curves.

    Args:
        curves: `[seeds, measurements]`.
        seed: Of the resampling.

    Returns:
        Point, low and high, `[measurements]` each.
    """
    values = np.asarray(curves, dtype=float)
    point = interquartile_mean(values, axis=0)
    if len(values) < 2:
        nothing = np.full(values.shape[1], math.nan)
        return point, nothing, nothing
    found = stats.bootstrap(
        (values,), interquartile_mean, n_resamples=RESAMPLES, axis=0, vectorized=True,
        method="percentile", confidence_level=CONFIDENCE, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return point, found.low, found.high


def _share_better(x: Array, y: Array) -> Any:
    """Mann-Whitney's U / (n m) along the last axis, for any number of resamples."""
    larger = (x[..., :, None] > y[..., None, :]).mean(axis=(-2, -1))
    equal = (x[..., :, None] == y[..., None, :]).mean(axis=(-2, -1))
    return larger + equal / 2


def _pairs(
    ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]
) -> list[tuple[ArrayLike, ArrayLike]]:
    return list(zip(ours, theirs, strict=True))


def _bootstrap(samples: list[Array], statistic: Callable[..., Any], seed: int) -> Interval:
    point = float(statistic(*samples, axis=-1))
    if min(map(len, samples)) < 2:
        return Interval(point, math.nan, math.nan)
    # With several samples scipy resamples each of them by itself: the strata.
    found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, vectorized=True, axis=-1,
        method="percentile", confidence_level=CONFIDENCE, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(point, float(found.low), float(found.high))
