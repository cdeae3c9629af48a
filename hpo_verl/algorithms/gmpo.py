"""Geometric-mean policy optimization, GMPO (arXiv 2507.20673).

    L_i = -A_i exp((1 / |o_i|) sum_t k_t)
    k_t = min(log r_t, e_high) for A > 0,   max(log r_t, -e_low) for A < 0

The ratio of a response is the geometric mean of its tokens' ratios, each clipped before, in logs:
e_low = e_high = 0.4 clips at e^-0.4 and e^0.4. A clipped token keeps its share of the mean and has
no gradient. A token's loss is L_i with the slope L_i, or 0 where it is clipped; the mean over the
response, then over responses (`seq-mean-token-mean`), is the paper's objective.

Checked against the public code (callsys/GMPO) and verl's `geo_mean`: both agree with this on a
whole mini-batch. verl's averages over each micro-batch and sums these means, so that its gradient
grows with their number and responses in small ones weigh more; hence this loss.
"""

from __future__ import annotations

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.ratios import response_log_ratio
from hpo_verl.core.surrogate import TokenLoss


def gmpo_loss(batch: base.TokenBatch, settings: None) -> TokenLoss:
    """GMPO's loss of every token; tokens of advantage 0 are in the mean with ratio 1."""
    low, high = batch.clip_range
    kept = torch.where(
        batch.advantages > 0, batch.log_ratio.clamp(max=high), batch.log_ratio.clamp(min=-low)
    )
    kept = torch.where(batch.advantages == 0, 0.0, kept)
    ratio = response_log_ratio(kept, batch.mask, per_token=True).exp()
    values = -ratio * batch.advantages
    return TokenLoss(values, values.masked_fill(kept != batch.log_ratio, 0.0))


ALGORITHMS = (
    base.Algorithm(
        "gmpo",
        ("2507.20673",),
        "-A prod_t r_t^(1/|y|), log r clipped at e_high for A > 0, -e_low for A < 0",
        base.SEQ_MEAN_TOKEN_MEAN,
        loss=base.Loss(
            "gmpo",
            gmpo_loss,
            aggregations=(base.SEQ_MEAN_TOKEN_MEAN,),
            clips=True,
            proportional=True,
            caveat="clips a response's ratios by its sign, so it knows one advantage per response",
        ),
    ),
)
