"""Group sequence policy optimisation, GSPO (arXiv 2507.18071), in its token form.

    l_it = -min(s_it A_i, clip(s_it, 1 - e_low, 1 + e_high) A_i)
    s_it = sg[s_i] pi(y_it) / sg[pi(y_it)],   s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|)

Every token of a response has the same ratio s_i; the gradient reaches each token's
log-probability with that weight.
"""

from __future__ import annotations

import torch

from hpo_verl.core.surrogate import TokenLoss

LOG_RATIO_LIMIT = 10.0
"""Largest mean log-ratio, nats, that enters the exponential; beyond it the gradient stops."""


def gspo_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> TokenLoss:
    """GSPO's loss of every token.

    Args:
        log_ratio: log pi - log pi_old, nats, 0 where masked, `[batch, response]`.
        advantages: `[batch, response]`.
        mask: Bool, `[batch, response]`.
        clip_ratio_low: Distance of the lower bound from 1.
        clip_ratio_high: Distance of the upper bound from 1.

    Returns:
        Loss and slope per token.
    """
    lengths = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = log_ratio.sum(dim=-1, keepdim=True) / lengths
    ratio = mean.clamp(max=LOG_RATIO_LIMIT).exp()
    surrogate = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    stopped = (clipped > surrogate) | (mean > LOG_RATIO_LIMIT)
    return TokenLoss(torch.maximum(surrogate, clipped), surrogate.masked_fill(stopped, 0.0))
