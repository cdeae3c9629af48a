"""Group-relative advantages of scalar rewards.

A group holds the responses to one prompt. Scalars of responses are few, so
they are computed in float64: sums over a batch of any size stay exact enough
that a sign never depends on rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

STD_EPSILON = 1e-6
"""Added to the standard deviation, as in verl's `grpo`."""


class GroupAdvantages(NamedTuple):
    """Advantages of one batch and what is known about its groups.

    Attributes:
        advantages: `[batch]` float64; 0 for rows that are not live.
        signs: Whether a score lies above (1), at (0) or below (-1) its group's mean, `[batch]`
            float64; 0 for rows that are not live.
        zero_spread: `[batch]` bool; live rows of groups whose scores are all equal.
        zero_spread_groups: Number of groups with a live row and equal scores.
        groups: Number of groups with a live row.
    """

    advantages: torch.Tensor
    signs: torch.Tensor
    zero_spread: torch.Tensor
    zero_spread_groups: int
    groups: int


def _centred(
    values: torch.Tensor, group_codes: torch.Tensor, live: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Subtract the group's mean, and tell which groups hold one value only.

    Values are equal if they differ by one rounding of their own type at most; one that is equal
    to the mean gets exactly 0.
    """
    rounding = torch.finfo(values.dtype if values.is_floating_point() else torch.float64).eps
    values = values.double().masked_fill(~live, 0.0)
    zeros = torch.zeros_like(count)
    mean = zeros.index_add(0, group_codes, values) / count.clamp(min=1)
    centred = (values - mean.index_select(0, group_codes)).masked_fill(~live, 0.0)
    magnitude = zeros.scatter_reduce(0, group_codes, values.abs(), "amax")

    # Rows that are not live hold 0 in `centred`: no extreme is theirs.
    highest = zeros.scatter_reduce(0, group_codes, centred, "amax")
    lowest = zeros.scatter_reduce(0, group_codes, centred, "amin")
    # The mean is rounded itself, in float64, once a member.
    tolerance = magnitude * (rounding + count * torch.finfo(torch.float64).eps)
    near = centred.abs() <= tolerance.index_select(0, group_codes)
    return centred.masked_fill(near, 0.0), highest - lowest <= tolerance


def group_relative_advantages(
    rewards: torch.Tensor,
    group_codes: torch.Tensor,
    live: torch.Tensor,
    *,
    scores: torch.Tensor | None = None,
    normalize_by_std: bool = True,
) -> GroupAdvantages:
    """Subtract the group's mean reward and divide by its standard deviation (arXiv 2402.03300).

    A_i = (R_i - mean_g) / (std_g + 1e-6), std unbiased (divisor n - 1); without
    normalisation A_i = R_i - mean_g. A group whose scores are all equal gets
    exactly 0, and so does a group of one.

    Args:
        rewards: One reward per response, `[batch]`.
        group_codes: Group of each response, `[batch]` int64, 0 .. groups - 1 in any order.
        live: Rows that count, `[batch]` bool; the others influence nothing.
        scores: Rewards before a penalty that differs by noise, such as a KL divergence, `[batch]`:
            signs and spread are theirs. None if they are the rewards.
        normalize_by_std: False gives R - mean (Dr. GRPO, arXiv 2503.20783).
    """
    size = int(group_codes.max()) + 1 if group_codes.numel() else 0
    zeros = torch.zeros(size, dtype=torch.float64, device=rewards.device)
    count = zeros.index_add(0, group_codes, live.double())
    centred, equal = _centred(rewards, group_codes, live, count)
    by_score = centred
    if scores is not None:
        by_score, equal = _centred(scores, group_codes, live, count)
    of_equal = equal.index_select(0, group_codes)

    advantages = centred
    if normalize_by_std:
        square = zeros.index_add(0, group_codes, centred.square())
        std = (square / (count - 1).clamp(min=1)).sqrt()
        advantages = centred / (std + STD_EPSILON).index_select(0, group_codes)

    occupied = count > 0
    return GroupAdvantages(
        advantages=advantages.masked_fill(of_equal, 0.0),
        signs=by_score.sign().masked_fill(of_equal, 0.0),
        zero_spread=of_equal & live,
        zero_spread_groups=int((equal & occupied).sum()),
        groups=int(occupied.sum()),
    )
