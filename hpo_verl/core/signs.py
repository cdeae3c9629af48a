"""Counts and weights by the sign of the advantage."""

from __future__ import annotations

import torch


def positive_negative_ratio(positives: int, negatives: int, low: float) -> float:
    """Ratio of two counts, bounded to [low, 1].

    Args:
        positives: Number of responses with a positive advantage.
        negatives: Number of responses with a negative advantage.
        low: Lower bound, in [0, 1].

    Returns:
        clip(positives / negatives, low, 1); 1 where `negatives` is 0, since
        there is then nothing to damp.
    """
    if negatives == 0:
        return 1.0
    return min(max(positives / negatives, low), 1.0)


def weight_negatives(advantages: torch.Tensor, alpha: float) -> torch.Tensor:
    """Multiply negative advantages by `alpha` and leave the others.

    Args:
        advantages: Any shape.
        alpha: Weight of the negatives, in [0, 1].

    Returns:
        Tensor of the same shape.
    """
    return advantages.clamp(min=0) + advantages.clamp(max=0) * alpha
