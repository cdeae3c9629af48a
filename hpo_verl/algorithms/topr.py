"""Tapered off-policy REINFORCE, TOPR (arXiv 2503.14286).

    grad J = sum over A >= 0 of  clip(rho, a+, b+) A grad log pi(y)
           + sum over A < 0  of  clip(rho, a-, b-) A grad log pi(y),   rho = pi(y) / pi_old(y)

rho is the ratio of whole responses, without gradient (Eq. 7). The canonical limits are
a+ = b+ = 1, a- = 0, b- = 1 (Eq. 8): positive responses weigh 1 however old they are, negative
ones min(rho, 1), so that a response that the policy already gave up pulls no further. No token
is stopped, there is no KL term.

Checked against Eq. 7, Eq. 8 and Algorithm 1 as an extract of the paper quotes them. Public ports
(verl's pull request 6986 among them) take the geometric mean of the tokens' ratios for rho:
`length_normalized` does the same. The paper's A is a reward of +1 or -1 minus a baseline of the
user's choice. Decided here: the group's mean, so R - mean, for rewards of any range. log pi(y) is
a sum over tokens, hence `seq-mean-token-sum`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.ratios import response_log_ratio
from hpo_verl.core.settings import require_flag, require_number
from hpo_verl.core.surrogate import TokenLoss, weighted_log_prob

PATH = "actor_rollout_ref.actor.policy_loss"


@dataclass(frozen=True)
class TOPRSettings:
    """Settings of TOPR, under `actor_rollout_ref.actor.policy_loss`.

    Attributes:
        positive_low: Smallest weight a+ of a positive response, at least 0.
        positive_high: Its largest b+, from `positive_low`; equal to it: no importance ratio.
        negative_low: Smallest weight a- of a negative response, at least 0.
        negative_high: Its largest b-, from `negative_low`.
        length_normalized: Whether rho is the geometric mean of the tokens' ratios.
    """

    positive_low: float = 1.0
    positive_high: float = 1.0
    negative_low: float = 0.0
    negative_high: float = 1.0
    length_normalized: bool = False

    def __post_init__(self) -> None:
        for sign in ("positive", "negative"):
            low = getattr(self, f"{sign}_low")
            require_number(f"{PATH}.{sign}_low", low, 0.0)
            require_number(f"{PATH}.{sign}_high", getattr(self, f"{sign}_high"), low)
        require_flag(f"{PATH}.length_normalized", self.length_normalized)


def topr_loss(batch: base.TokenBatch, settings: TOPRSettings) -> TokenLoss:
    """TOPR's loss of every token: -sg[weight] A log pi, with the slope -weight A."""
    rho = response_log_ratio(
        batch.log_ratio, batch.mask, per_token=settings.length_normalized
    ).exp()
    weight = torch.where(
        batch.advantages < 0,
        rho.clamp(settings.negative_low, settings.negative_high),
        rho.clamp(settings.positive_low, settings.positive_high),
    )
    log_prob = batch.old_log_prob + batch.log_ratio
    return weighted_log_prob(weight, batch.advantages, log_prob)


ALGORITHMS = (
    base.Algorithm(
        "topr",
        ("2503.14286",),
        "-sg[w] A log pi, w = 1 for A > 0, min(r_seq, 1) for A < 0",
        base.SEQ_MEAN_TOKEN_SUM,
        loss=base.Loss(
            "topr",
            topr_loss,
            TOPRSettings,
            aggregations=(
                base.SEQ_MEAN_TOKEN_SUM,
                # The same over the mini-batch's mean length; and that of the public ports.
                base.TOKEN_MEAN,
                base.SEQ_MEAN_TOKEN_MEAN,
            ),
            proportional=True,
        ),
    ),
)
