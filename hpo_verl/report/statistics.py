"""Statistics over seeds, after arXiv 2108.13264, computed by scipy.

A learning curve is reduced to a few measures, and a set of runs to the interquartile mean with a
percentile bootstrap interval of 95 %. Methods share their seeds, so differences are taken seed by
seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

_Key = TypeVar("_Key")

CONFIDENCE = 0.95
RESAMPLES = 5_000
LEAST_SEEDS = 3
"""Fewer values say next to nothing about their spread: no interval."""
FINAL_SHARE = 0.1
"""Final success is the mean over the measurements in this last share of the budget."""
EARLY_SHARE = 0.25
"""Early success is that after this share of the budget."""
COLLAPSE_FRACTION, COLLAPSE_POINTS = 0.5, 0.05
"""A run collapsed if its final success is below this share of its best, and by so much too."""


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
        `early`: success after the first quarter of the budget, linear between measurements;
        `final`: mean over the last tenth of the budget; `area`: under the curve, divided by the
        budget; `best`: the largest success that was measured.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(success, dtype=float)
    budget = float(x[-1])
    return {
        "early": float(np.interp(EARLY_SHARE * budget, x, y)),
        "final": float(y[x > (1 - FINAL_SHARE) * budget].mean()),
        "area": float(np.trapezoid(y, x) / budget),
        "best": float(y.max()),
    }


def has_collapsed(final: float, best: float) -> bool:
    """Whether a run lost what it had reached: half of it and five percentage points at least."""
    return final < COLLAPSE_FRACTION * best and final < best - COLLAPSE_POINTS


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


def summary(values: ArrayLike) -> Interval | None:
    """Interquartile mean and interval of the values that are no NaN; None where there are none."""
    found = np.asarray(values, dtype=float)
    return _summary(tuple(found[~np.isnan(found)].tolist()))


# One page asks for the same interval in several places.
@cache
def _summary(values: tuple[float, ...]) -> Interval | None:
    return interval(values) if values else None


class Effect(NamedTuple):
    """What a method changes against another, seed by seed.

    Attributes:
        pairs: Seeds that both have.
        difference: Interquartile mean of the differences, with an interval from `LEAST_SEEDS`
            pairs on; None without a pair.
    """

    pairs: int
    difference: Interval | None

    @property
    def better(self) -> bool:
        """Whether the interval is above 0."""
        return self.difference is not None and self.difference.low > 0

    @property
    def worse(self) -> bool:
        """Whether the interval is below 0."""
        return self.difference is not None and self.difference.high < 0


def effect(ours: Mapping[_Key, float], theirs: Mapping[_Key, float]) -> Effect:
    """The effect from a measure of two methods by what pairs them; NaN in one is no pair."""
    differences = [value - theirs[key] for key, value in ours.items() if key in theirs]
    known = [value for value in differences if not math.isnan(value)]
    return Effect(len(known), summary(known))
