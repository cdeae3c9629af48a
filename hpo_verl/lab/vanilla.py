"""verl's policy loss `vanilla`: PPO's clip, and a second one for A < 0 (arXiv 1912.09729).

    l_t = -min(r A, clip(r, 1 - e_low, 1 + e_high) A)              A >= 0
    l_t = min(-c A, max(-r A, -clip(r, 1 - e_low, 1 + e_high) A))  A < 0

Recipes set c out of reach where their paper has no second clip.
"""

from __future__ import annotations

import torch

from hpo_verl.core.clipping import clipped_surrogate
from hpo_verl.core.surrogate import TokenLoss


def vanilla_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
) -> TokenLoss:
    """Loss of every token.

    Args:
        log_ratio: Bounded log-ratio, nats, `[batch, response]`.
        advantages: `[batch, response]`.
        clip_ratio_low: Distance of the lower bound from 1, in [0, 1].
        clip_ratio_high: Distance of the upper bound from 1, at least 0.
        clip_ratio_c: Ratio c beyond which a token with A < 0 has no gradient, above 1.

    Returns:
        Loss and slope per token.
    """
    loss = clipped_surrogate(log_ratio, advantages, clip_ratio_low, clip_ratio_high)
    beyond = (advantages < 0) & (loss.values > -clip_ratio_c * advantages)
    return TokenLoss(
        torch.where(beyond, -clip_ratio_c * advantages, loss.values),
        loss.slopes.masked_fill(beyond, 0.0),
    )
