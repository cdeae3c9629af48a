"""Variational sequence-level soft policy optimization, VESPO (arXiv 2602.10693).

    l_t = -sg[phi(W)] A log pi(y_t),   phi(W) = W^c1 exp(c2 (1 - W)),   W = pi(y) / pi_old(y)

W is the ratio of the whole response, a product over its tokens without a length normaliser.
phi(1) = 1; c1 damps ratios below 1 and c2 ratios above; both differ by the sign of A. No token is
stopped, the kernel carries no gradient.

Checked against the paper's third version (Eq. 20, pseudocode of Section I, values of Section 4.1)
and its code (FloyedShen/VESPO); TRL's `get_gamma_weights` agrees, and bounds log W at log 1e-8
where the bound here is -20: phi is below 1e-12 at either. The paper leaves the mean over a batch
open: `token-mean` is that of its code, `seq-mean-token-sum` Eq. 20 to the letter. The paper's
advantage is R - mean, its scripts divide by the standard deviation too. Weights of verl's rollout
correction multiply the loss, as everywhere; the paper's code takes them into W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.ratios import response_log_ratio
from hpo_verl.core.settings import require_number
from hpo_verl.core.surrogate import TokenLoss, weighted_log_prob


@dataclass(frozen=True)
class VESPOSettings:
    """Settings of VESPO, under `actor_rollout_ref.actor.policy_loss`.

    Attributes:
        k_pos: Exponent c1 for A >= 0, at least 0.
        lambda_pos: Decay c2 for A >= 0, at least 0.
        k_neg: Exponent c1 for A < 0.
        lambda_neg: Decay c2 for A < 0.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            path = f"actor_rollout_ref.actor.policy_loss.{name}"
            require_number(path, getattr(self, name), 0.0)


def vespo_loss(batch: base.TokenBatch, settings: VESPOSettings) -> TokenLoss:
    """VESPO's loss of every token: -sg[phi] A log pi, with the slope -phi A."""
    log_w = response_log_ratio(batch.log_ratio, batch.mask)
    # log phi = c1 log W + c2 (1 - W), which is exact near W = 1.
    below = -log_w.expm1()
    phi = torch.where(
        batch.advantages < 0,
        (settings.k_neg * log_w + settings.lambda_neg * below).exp(),
        (settings.k_pos * log_w + settings.lambda_pos * below).exp(),
    )
    log_prob = batch.old_log_prob + batch.log_ratio
    return weighted_log_prob(phi, batch.advantages, log_prob)


ALGORITHMS = (
    base.Algorithm(
        "vespo",
        ("2602.10693",),
        "-sg[r^c1 exp(c2 (1 - r))] A log pi, r of the response, c by the sign of A",
        base.TOKEN_MEAN,
        loss=base.Loss(
            "vespo",
            vespo_loss,
            VESPOSettings,
            aggregations=(base.TOKEN_MEAN, base.SEQ_MEAN_TOKEN_SUM),
            proportional=True,
        ),
    ),
)
