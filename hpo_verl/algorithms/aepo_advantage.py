"""Policy update of agentic entropy-balanced policy optimization, AEPO (arXiv 2510.14545).

    A'_t = A_t (1 + a z(H_t)),   z(H) = (H - mean H) / std H over the tokens of the batch
    l_t  = -min(r_t A'_t, clip(r_t, 1 - e_low, (1 + e_high) r_t / sg[r_t]) A'_t)

H_t is the entropy of the policy at token t, in nats. A token of positive
advantage whose ratio exceeds 1 + e_high keeps the value of PPO's clip, and its
gradient with the constant weight 1 + e_high, where PPO would stop it. The
weight 1 + a z is negative where z < -1 / a; the equation has no bound there.

The paper's rollouts, which branch at tool calls of high entropy, are an agent loop:
see docs/pages/tools.md. The scale a = 0.2 and the unbiased standard
deviation are those of its public code, which takes the statistics and the
entropy of the current policy per micro-batch, and clips a second time (dual
clip) where the advantage is negative; here they are the old policy's over the
whole rollout batch, and the second clip is off (`clip_ratio_c`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_number
from hpo_verl.core.surrogate import TokenLoss, clipped_surrogate


@dataclass(frozen=True)
class AEPOAdvantageSettings:
    """Settings of the entropy-aware advantage, under `algorithm.aepo_advantage`.

    Attributes:
        entropy_scale: Scale a of the standardised entropy, at least 0; 0 is the plain advantage.
    """

    entropy_scale: float = 0.2

    def __post_init__(self) -> None:
        require_number("algorithm.aepo_advantage.entropy_scale", self.entropy_scale, 0.0)


def standardized_entropy(entropy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Standardise the entropy, nats, `[batch, response]`, over all live tokens.

    Returns:
        z(H), `[batch, response]` float64: mean 0 and unbiased standard deviation 1 over the live
        tokens; 0 at masked ones, and everywhere if fewer than two are live or all are equal.
    """
    live = entropy[mask].double()
    scores = entropy.new_zeros(entropy.shape, dtype=torch.float64)
    if len(live) > 1 and bool((live != live[0]).any()):
        scores[mask] = (live - live.mean()) / live.std()
    return scores


def entropy_aware_advantages(
    rollout: base.Rollout, settings: AEPOAdvantageSettings
) -> base.Advantages:
    """Raise advantages at tokens of high entropy and lower them at tokens of low entropy.

    Returns:
        A (1 + a z(H)), `[batch, response]` float64; 0 at masked tokens.
    """
    scores = standardized_entropy(rollout.extras["entropy"], rollout.mask)
    weights = (1.0 + settings.entropy_scale * scores).masked_fill(~rollout.mask, 0.0)
    advantages = rollout.to_outputs(rollout.grouped().advantages)
    return base.Advantages(advantages.unsqueeze(-1) * weights)


def aepo_clip_loss(batch: base.TokenBatch, settings: None) -> TokenLoss:
    """AEPO's loss of every token.

    Values are those of the clipped surrogate. So are the slopes, except where the
    advantage is positive and r_t > 1 + clip_ratio_high: there the slope is
    -(1 + clip_ratio_high) A_t instead of 0.
    """
    loss = clipped_surrogate(
        batch.log_ratio, batch.advantages, *batch.clip_range, batch.clip_ratio_c
    )
    stopped = (batch.advantages > 0) & (loss.slopes == 0)
    return TokenLoss(loss.values, torch.where(stopped, loss.values, loss.slopes))


ALGORITHMS = (
    base.Algorithm(
        "aepo_advantage",
        ("2510.14545",),
        f"{base.CLIP}, A (1 + a z(H)), gradient kept above it",
        base.TOKEN_MEAN,
        base.Estimator(
            "aepo_advantage",
            entropy_aware_advantages,
            AEPOAdvantageSettings,
            section="aepo_advantage",
            needs=("entropy",),
        ),
        base.Loss(
            "aepo_clip",
            aepo_clip_loss,
            aggregations=(base.TOKEN_MEAN, base.SEQ_MEAN_TOKEN_MEAN),
            clips=True,
            dual_clips=True,
            proportional=True,
        ),
    ),
)
