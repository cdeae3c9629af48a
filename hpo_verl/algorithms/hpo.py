"""Hysteretic policy optimisation: HPO and A-HPO (arXiv 2605.30201).

    J = (1/N) sum_i (1/L) sum_t min(r_it w(A_i) A_i, clip(r_it, 1 - e_low, 1 + e_high) w(A_i) A_i)
    w(A) = 1 for A > 0, alpha for A < 0;   L = mean length of the responses
    HPO: alpha fixed;   A-HPO: alpha = clip(n+ / n-, alpha_min, 1)

A_i is GRPO's group-relative advantage, r_it the token's importance ratio, n+
and n- the numbers of responses of the rollout batch whose score lies above and
below their group's mean. Without a KL penalty in the rewards these are the
signs of the advantages.

The paper fixes w, L and A-HPO's ratio of counts. It leaves open, and this
module decides: token-level ratio, clip 0.2 / 0.2, dual clip off, counts over
the whole rollout batch, advantages normalised by the standard deviation,
alpha_min 0.1. (1/N) sum_i (1/L) sum_t is the mean over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_choice, require_number
from hpo_verl.core.surrogate import TokenLoss, clipped_surrogate

ZERO_ADVANTAGE_CHOICES = ("ignore", "negative")


@dataclass(frozen=True)
class HPOSettings:
    """Settings of HPO, under `algorithm.hpo`.

    Attributes:
        alpha: Weight of negative advantages, in [0, 1].
        zero_advantage: Whether failed responses (reward <= 0) of groups with equal rewards
            count as negatives (`negative`) or not (`ignore`). Here it changes logged counts only.
    """

    alpha: float = 0.6
    zero_advantage: str = "ignore"

    def __post_init__(self) -> None:
        require_number("algorithm.hpo.alpha", self.alpha, 0.0, 1.0)
        require_choice("algorithm.hpo.zero_advantage", self.zero_advantage, ZERO_ADVANTAGE_CHOICES)

    def weight(self, positives: int, negatives: int) -> float:
        """Return alpha, whatever the counts."""
        return float(self.alpha)


@dataclass(frozen=True)
class AHPOSettings:
    """Settings of A-HPO, under `algorithm.hpo`.

    Attributes:
        alpha_min: Lower bound of the weight, in [0, 1].
        zero_advantage: As in `HPOSettings`; here it changes the weight.
    """

    alpha_min: float = 0.1
    zero_advantage: str = "ignore"

    def __post_init__(self) -> None:
        require_number("algorithm.hpo.alpha_min", self.alpha_min, 0.0, 1.0)
        require_choice("algorithm.hpo.zero_advantage", self.zero_advantage, ZERO_ADVANTAGE_CHOICES)

    def weight(self, positives: int, negatives: int) -> float:
        """Return clip(n+ / n-, alpha_min, 1); 1 without negatives, since nothing is to damp."""
        if negatives == 0:
            return 1.0
        return min(max(positives / negatives, self.alpha_min), 1.0)


def hysteretic_advantages(
    rollout: base.Rollout, settings: HPOSettings | AHPOSettings
) -> base.Advantages:
    """Group-relative advantages, the negative ones damped by one weight per batch.

    Returns:
        One advantage per response, `[batch]` float64, and the counts behind the weight.
    """
    group = rollout.grouped()
    advantages = group.advantages
    positives = int((group.signs > 0).sum())
    negatives = int((group.signs < 0).sum())
    if settings.zero_advantage == "negative":
        scores = rollout.rewards if rollout.scores is None else rollout.scores
        negatives += int((group.zero_spread & (scores <= 0)).sum())
    alpha = settings.weight(positives, negatives)
    return base.Advantages(
        values=advantages.clamp(min=0) + advantages.clamp(max=0) * alpha,
        unweighted=advantages,
        alpha=alpha,
        positives=positives,
        negatives=negatives,
    )


def hpo_loss(batch: base.TokenBatch, settings: None) -> TokenLoss:
    """Loss per token: the clipped surrogate of weighted advantages."""
    return clipped_surrogate(
        batch.log_ratio, batch.advantages, *batch.clip_range, batch.clip_ratio_c
    )


LOSS = base.Loss(
    "hpo",
    hpo_loss,
    aggregations=(base.TOKEN_MEAN,),
    clips=True,
    dual_clips=True,
    proportional=True,
)

ALGORITHMS = (
    base.Algorithm(
        "a_hpo",
        ("2605.30201",),
        f"{base.CLIP}, A < 0 weighted by clip(n+/n-, alpha_min, 1)",
        base.TOKEN_MEAN,
        base.Estimator(
            "a_hpo", hysteretic_advantages, AHPOSettings, section="hpo", weights_by_sign=True
        ),
        LOSS,
    ),
    base.Algorithm(
        "hpo",
        ("2605.30201",),
        f"{base.CLIP}, A < 0 weighted by alpha",
        base.TOKEN_MEAN,
        base.Estimator(
            "hpo", hysteretic_advantages, HPOSettings, section="hpo", weights_by_sign=True
        ),
        LOSS,
    ),
)
