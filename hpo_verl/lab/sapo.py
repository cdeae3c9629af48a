"""Soft adaptive policy optimisation, SAPO (arXiv 2511.20347).

    l_t = -f(r_t) A_t,   f(r) = sigmoid(tau (r - 1)) 4 / tau
    tau = tau_pos where A > 0, else tau_neg

df/dr = 4 p (1 - p) with p = sigmoid(tau (r - 1)), which is 1 at r = 1 for every tau.
"""

from __future__ import annotations

import torch

from hpo_verl.core.surrogate import TokenLoss


def sapo_loss(
    log_ratio: torch.Tensor, advantages: torch.Tensor, tau_pos: float, tau_neg: float
) -> TokenLoss:
    """SAPO's loss of every token.

    Args:
        log_ratio: Bounded log-ratio, nats, `[batch, response]`.
        advantages: `[batch, response]`.
        tau_pos: Temperature of the gate for positive advantages, greater than 0.
        tau_neg: The same for the others.

    Returns:
        Loss and slope per token.
    """
    ratio = log_ratio.exp()
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    gate = torch.sigmoid(tau * (ratio - 1.0))
    slopes = -advantages * 4.0 * gate * (1.0 - gate) * ratio
    return TokenLoss(-advantages * gate * 4.0 / tau, slopes)
