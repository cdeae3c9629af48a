"""Quantiles of rows, and windows of tokens, under a mask."""

from __future__ import annotations

import torch
from torch.nn import functional


def row_quantiles(values: torch.Tensor, mask: torch.Tensor, quantile: float) -> torch.Tensor:
    """Quantile of the live values of every row that has one, `[rows]`, linear between two."""
    rows = mask.any(dim=-1)
    ordered = values[rows].masked_fill(~mask[rows], torch.inf).sort(dim=-1).values
    place = quantile * (mask[rows].sum(dim=-1, keepdim=True) - 1).to(values.dtype)
    low, high = (ordered.gather(-1, end.long()) for end in (place.floor(), place.ceil()))
    return (low + (place - place.floor()) * (high - low)).squeeze(-1)


def high_windows(
    entropy: torch.Tensor, mask: torch.Tensor, width: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the windows of live tokens whose mean entropy exceeds the threshold.

    Returns:
        Where such a window begins, and which tokens are in one, `[batch, response]` bool each.
    """
    ahead = (0, width - 1)
    means = functional.pad(entropy.masked_fill(~mask, 0.0), ahead).unfold(1, width, 1).mean(-1)
    whole = functional.pad(mask, ahead).unfold(1, width, 1).all(dim=-1)
    begins = whole & (means > threshold)
    return begins, functional.pad(begins, ahead[::-1]).unfold(1, width, 1).any(dim=-1)
