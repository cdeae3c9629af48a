"""Balanced policy optimization with adaptive clipping, BAPO (arXiv 2510.18927).

    l_t = -min(r_t A_t, clip(r_t, c_low, c_high) A_t)

c_low and c_high are found anew for every mini-batch, so that tokens of positive
advantage make up at least the share rho_0 of what the loss is made of (Eq. 8):

    rho = P / (P + N) >= rho_0
    P = sum over A_t > 0 of  pi_old(y_t) A_t min(r_t, c_high)
    N = sum over A_t < 0 of  pi_old(y_t) |A_t| max(r_t, c_low)

Both bounds start at the low ends of their ranges; c_high rises step by step, and
once it has reached its upper end c_low does, until rho >= rho_0 (Algorithm 1). The
last step of a range ends at its end, as in the public code.
P and N run over the whole mini-batch on all ranks.

Eq. 8 prints its bars outside the sum over all tokens, |P - N|, which is no share;
read here as P + N. Raising c_low never raises rho, it raises N: what it does is to
stop the gradient of more negative tokens (r_t < c_low).

The public code leaves pi_old out and raises c_low before c_high: `repo_compatible`
does the same. Its dual clip is `clip_ratio_c` = 3. The objective has no KL term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_flag, require_number
from hpo_verl.core.surrogate import TokenLoss, clipped_surrogate

PATH = "actor_rollout_ref.actor.policy_loss"
# Far above float64's rounding of a sum, far below a difference that matters: a share
# equal to the target counts as reaching it, in whatever order the sums were taken.
RELATIVE_TOLERANCE = 1e-9
MOST_STEPS = 1000


@dataclass(frozen=True)
class BAPOSettings:
    """Settings of BAPO, under `actor_rollout_ref.actor.policy_loss`.

    The bounds are ratios, not distances from 1; each rises by steps from its start to its end.

    Attributes:
        positive_share: Share rho_0 that positive tokens are to reach, in [0, 1].
        clip_low_start: First c_low, in [0, 1].
        clip_low_end: Largest c_low, from `clip_low_start` to 1.
        clip_low_step: Above 0.
        clip_high_start: First c_high, at least 1.
        clip_high_end: Largest c_high, from `clip_high_start`.
        clip_high_step: Above 0.
        repo_compatible: Sums without pi_old and c_low raised first, as in the public code.
    """

    positive_share: float = 0.4
    clip_low_start: float = 0.6
    clip_low_end: float = 0.9
    clip_low_step: float = 0.02
    clip_high_start: float = 1.2
    clip_high_end: float = 3.0
    clip_high_step: float = 0.05
    repo_compatible: bool = False

    def __post_init__(self) -> None:
        require_number(f"{PATH}.positive_share", self.positive_share, 0.0, 1.0)
        require_number(f"{PATH}.clip_low_start", self.clip_low_start, 0.0, 1.0)
        require_number(f"{PATH}.clip_low_end", self.clip_low_end, self.clip_low_start, 1.0)
        require_number(f"{PATH}.clip_high_start", self.clip_high_start, 1.0)
        require_number(f"{PATH}.clip_high_end", self.clip_high_end, self.clip_high_start)
        for name in ("clip_low", "clip_high"):
            width = getattr(self, f"{name}_end") - getattr(self, f"{name}_start")
            step = getattr(self, f"{name}_step")
            require_number(f"{PATH}.{name}_step", step, width / MOST_STEPS, open_low=width == 0)
        require_flag(f"{PATH}.repo_compatible", self.repo_compatible)

    @property
    def lower_bounds(self) -> tuple[float, ...]:
        """Every c_low that may be chosen, rising."""
        return _bounds(self.clip_low_start, self.clip_low_end, self.clip_low_step)

    @property
    def upper_bounds(self) -> tuple[float, ...]:
        """Every c_high that may be chosen, rising."""
        return _bounds(self.clip_high_start, self.clip_high_end, self.clip_high_step)


def _bounds(start: float, end: float, step: float) -> tuple[float, ...]:
    # Where the step does not divide the range, the last one is shorter.
    steps = math.ceil((end - start) / step * (1 - RELATIVE_TOLERANCE))
    return tuple(min(start + count * step, end) for count in range(steps + 1))


class ClipBounds(NamedTuple):
    """c_low and c_high, ratios, and rho there, which is 0 without a token of either sign."""

    bapo_low: float
    bapo_high: float
    bapo_positive_share: float


def contributions(batch: base.TokenBatch, settings: BAPOSettings) -> torch.Tensor:
    """Sum what the tokens of a part of a mini-batch contribute, at every bound.

    Returns:
        P at every upper bound, then N at every lower bound, float64. The sums of parts
        add up to those of the whole.
    """
    ratio = batch.log_ratio.double().exp()
    weights = batch.advantages.double()
    if not settings.repo_compatible:
        weights = weights * batch.old_log_prob.double().exp()
    positive, negative = weights.clamp(min=0.0), -weights.clamp(max=0.0)
    return torch.stack(
        [
            *((positive * ratio.clamp(max=high)).sum() for high in settings.upper_bounds),
            *((negative * ratio.clamp(min=low)).sum() for low in settings.lower_bounds),
        ]
    )


def find_clip_bounds(sums: Sequence[float], settings: BAPOSettings) -> ClipBounds:
    """Search the bounds as Algorithm 1 does.

    Args:
        sums: Total of `contributions` over the mini-batch.
        settings: The bounds and the target.

    Returns:
        The first bounds at which the target is reached, or the upper ends of both ranges. A
        mini-batch without a token of either sign reaches it at once.
    """
    lows, highs = settings.lower_bounds, settings.upper_bounds
    positive, negative = sums[: len(highs)], sums[len(highs) :]
    target = settings.positive_share * (1.0 - RELATIVE_TOLERANCE)
    low = high = 0
    while positive[high] < target * (positive[high] + negative[low]):
        raise_high, raise_low = high + 1 < len(highs), low + 1 < len(lows)
        if raise_high and not (settings.repo_compatible and raise_low):
            high += 1
        elif raise_low:
            low += 1
        else:
            break
    total = positive[high] + negative[low]
    return ClipBounds(lows[low], highs[high], positive[high] / total if total > 0 else 0.0)


def bapo_loss(batch: base.TokenBatch, settings: BAPOSettings) -> TokenLoss:
    """BAPO's loss of every token: the clipped surrogate between two ratios, without gradient."""
    low, high, _ = batch.extras["mini_batch"]
    return clipped_surrogate(
        batch.log_ratio, batch.advantages, 1.0 - low, high - 1.0, batch.clip_ratio_c
    )


ALGORITHMS = (
    base.Algorithm(
        "bapo",
        ("2510.18927",),
        "-min(r A, clip(r, c_low, c_high) A), bounds set per mini-batch",
        base.TOKEN_MEAN,
        loss=base.Loss(
            "bapo",
            bapo_loss,
            BAPOSettings,
            aggregations=(base.TOKEN_MEAN,),
            dual_clips=True,
            selects=True,
            caveat="sets its clip bounds by the sums of positive and negative advantages",
            mini_batch_sums=base.MiniBatchSums(contributions, find_clip_bounds, ClipBounds),
        ),
    ),
)
