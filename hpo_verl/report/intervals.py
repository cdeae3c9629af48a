"""Bootstrap intervals of means over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Fewer values say next to nothing about their spread.
LEAST_SEEDS = 3
RESAMPLES = 10_000
CONFIDENCE = 0.95


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a mean.

    The seeds are drawn with replacement; the interval holds the middle 95 % of
    the means of 10,000 draws. It repeats: the draws are seeded. With few seeds it
    is too narrow (with three, it covers the mean about three times in four).

    Args:
        values: one for each seed.

    Returns:
        Lower and upper bound, or None for fewer than three values.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if len(values) < LEAST_SEEDS:
        return None
    generator = np.random.default_rng(0)
    draws = generator.choice(np.asarray(values, dtype=np.float64), (RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws.mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)
