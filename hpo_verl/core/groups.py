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

RELATIVE_TOLERANCE = 1e-6
"""Rewards closer than this share of the largest one in their group are equal.

Eight units in the last place of float32: the most by which sums of the same
token rewards in another order are expected to differ.
"""


class GroupAdvantages(NamedTuple):
    """Advantages of one batch and what is known about its groups.

    Attributes:
        advantages: `[batch]` float64; 0 for rows that are not live.
        zero_spread: `[batch]` bool; live rows of groups whose rewards are all equal.
        zero_spread_groups: Number of groups with a live row and equal rewards.
        groups: Number of groups with a live row.
    """

    advantages: torch.Tensor
    zero_spread: torch.Tensor
    zero_spread_groups: int
    groups: int


def group_relative_advantages(
    rewards: torch.Tensor,
    group_codes: torch.Tensor,
    live: torch.Tensor,
    *,
    normalize_by_std: bool = True,
) -> GroupAdvantages:
    """Subtract the group's mean reward and divide by its standard deviation (arXiv 2402.03300).

    A_i = (R_i - mean_g) / (std_g + 1e-6), std unbiased (divisor n - 1); without
    normalisation A_i = R_i - mean_g. A group whose rewards are all equal gets
    exactly 0, and so does a group of one.

    Args:
        rewards: One reward per response, `[batch]`.
        group_codes: Group of each response, `[batch]` int64, 0 .. groups - 1 in any order.
        live: Rows that count, `[batch]` bool; the others influence nothing.
        normalize_by_std: False gives R - mean (Dr. GRPO, arXiv 2503.20783).
    """
    rewards = rewards.double().masked_fill(~live, 0.0)
    size = int(group_codes.max()) + 1 if group_codes.numel() else 0
    zeros = rewards.new_zeros(size)

    count = zeros.index_add(0, group_codes, live.double())
    mean = zeros.index_add(0, group_codes, rewards) / count.clamp(min=1)
    centred = (rewards - mean.index_select(0, group_codes)).masked_fill(~live, 0.0)

    # Rows that are not live hold 0 in `centred` and `rewards`: they are left
    # out of the largest deviation and cannot raise the largest magnitude.
    deviation = zeros.scatter_reduce(0, group_codes, centred.abs(), "amax")
    magnitude = zeros.scatter_reduce(0, group_codes, rewards.abs(), "amax")
    tolerance = RELATIVE_TOLERANCE * magnitude
    equal = deviation <= tolerance
    near = centred.abs() <= tolerance.index_select(0, group_codes)
    centred = centred.masked_fill(near, 0.0)

    advantages = centred
    if normalize_by_std:
        square = zeros.index_add(0, group_codes, centred.square())
        std = (square / (count - 1).clamp(min=1)).sqrt()
        advantages = centred / (std + STD_EPSILON).index_select(0, group_codes)

    occupied = count > 0
    return GroupAdvantages(
        advantages=advantages,
        zero_spread=equal.index_select(0, group_codes) & live,
        zero_spread_groups=int((equal & occupied).sum()),
        groups=int(occupied.sum()),
    )
