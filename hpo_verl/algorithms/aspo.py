"""Asymmetric importance sampling policy optimization, ASPO (arXiv 2510.06062).

    l_t = -w_t A_t,   stopped (slope 0) where A > 0 and r > 1 + e_high, or A < 0 and r < 1 - e_low
    w   = r                                              for A < 0
    w   = pi_old pi / sg[pi^2], in value 1 / r           for A > 0

The ratio of positive tokens is turned over: a token that fell behind weighs more, where PPO lets
it weigh less; the derivative of w by log pi is +1 / r. What is stopped is what PPO's clip stops,
by r itself. A reciprocal above `reciprocal_limit` is cut in value and keeps its gradient, with
that weight (soft dual clip, as CISPO cuts); negative tokens have PPO's dual clip, `clip_ratio_c`.

Checked against the public code (wizard-III/Archer2.0) and notes that quote the paper's equations:
stop, reciprocal and soft clip agree. Limit 3 is the code's, the paper's is not known. The code
cuts negative tokens softly too: `repo_compatible`. It also clips tokens of high entropy at 0.4,
of which the notes know nothing, and adds a KL term of 0.001: left out. The notes divide by
|o_i| (`seq-mean-token-mean`), the code takes `token-mean`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_flag, require_number
from hpo_verl.core.surrogate import TokenLoss, clipped_surrogate

PATH = "actor_rollout_ref.actor.policy_loss"


@dataclass(frozen=True)
class ASPOSettings:
    """Settings of ASPO, under `actor_rollout_ref.actor.policy_loss`.

    Attributes:
        reciprocal_limit: Largest weight 1 / r of a positive token, at least 1.
        repo_compatible: Whether negative tokens beyond `clip_ratio_c` keep a gradient of that
            weight, as in the public code.
    """

    reciprocal_limit: float = 3.0
    repo_compatible: bool = False

    def __post_init__(self) -> None:
        require_number(f"{PATH}.reciprocal_limit", self.reciprocal_limit, 1.0)
        require_flag(f"{PATH}.repo_compatible", self.repo_compatible)


def aspo_loss(batch: base.TokenBatch, settings: ASPOSettings) -> TokenLoss:
    """ASPO's loss of every token; a slope is the value -w A, or 0 where the token is stopped."""
    high = 1.0 + batch.clip_range[1]
    negative = clipped_surrogate(
        batch.log_ratio, batch.advantages, *batch.clip_range, batch.clip_ratio_c
    )
    slopes = negative.slopes
    ratio = batch.log_ratio.exp()
    if settings.repo_compatible:
        slopes = torch.where(ratio > batch.clip_ratio_c, negative.values, slopes)
    weight = ratio.clamp(max=high).reciprocal().clamp(max=settings.reciprocal_limit)
    positive = -weight * batch.advantages
    above = batch.advantages > 0
    return TokenLoss(
        torch.where(above, positive, negative.values),
        torch.where(above, positive.masked_fill(ratio > high, 0.0), slopes),
    )


ALGORITHMS = (
    base.Algorithm(
        "aspo",
        ("2510.06062",),
        f"{base.CLIP}, for A > 0 -min(1 / r, c) A up to 1 + e_high",
        base.SEQ_MEAN_TOKEN_MEAN,
        loss=base.Loss(
            "aspo",
            aspo_loss,
            ASPOSettings,
            aggregations=(base.SEQ_MEAN_TOKEN_MEAN, base.TOKEN_MEAN),
            clips=True,
            dual_clips=True,
            proportional=True,
        ),
    ),
)
