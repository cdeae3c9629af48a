"""The clipped surrogate of PPO (arXiv 1707.06347)."""

from __future__ import annotations

import torch

from hpo_verl.core.surrogate import TokenLoss


def clipped_surrogate(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_ratio_low: float | torch.Tensor,
    clip_ratio_high: float | torch.Tensor,
) -> TokenLoss:
    """Clipped surrogate of every token, negated; no dual clip.

    l_t = -min(r_t A_t, clip(r_t, 1 - clip_ratio_low, 1 + clip_ratio_high) A_t)

    The slope is -r_t A_t where the first term is the smaller one, else 0.

    Args:
        log_ratio: Bounded log-ratio, nats, `[batch, response]`.
        advantages: Weighted advantages, `[batch, response]`.
        clip_ratio_low: Distance of the lower bound from 1, in [0, 1); one, or `[batch, response]`.
        clip_ratio_high: Distance of the upper bound from 1, at least 0; one, or as above.

    Returns:
        Loss and slope per token.
    """
    ratio = log_ratio.exp()
    surrogate = ratio * -advantages
    clipped = ratio.clamp_(min=1.0 - clip_ratio_low).clamp_(max=1.0 + clip_ratio_high)
    clipped.mul_(-advantages)
    values = torch.maximum(surrogate, clipped)
    return TokenLoss(values, surrogate.masked_fill_(clipped > surrogate, 0.0))
