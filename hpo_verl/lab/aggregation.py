"""From a loss per token to the loss of a mini-batch, in verl's modes.

token-mean                sum_it l_it / sum_i |y_i|                  HPO, DAPO
seq-mean-token-mean       (1/N) sum_i (1/|y_i|) sum_t l_it           GRPO (arXiv 2402.03300)
seq-mean-token-sum-norm   (1/N) sum_i (1/C) sum_t l_it               Dr. GRPO (arXiv 2503.20783)
"""

from __future__ import annotations

import torch

from hpo_verl.algorithms.catalog import SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM_NORM, TOKEN_MEAN

MODES = (TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM_NORM)


def token_weights(
    mask: torch.Tensor, loss_agg_mode: str, loss_scale_factor: float | None
) -> torch.Tensor:
    """Weight of every token's loss; the loss of the mini-batch is the weighted sum.

    Args:
        mask: Bool, `[batch, response]`; every row has a live token.
        loss_agg_mode: One of `MODES`.
        loss_scale_factor: The constant length C, tokens; read by `seq-mean-token-sum-norm` only.

    Returns:
        `[batch, response]`; 0 where the mask is false.
    """
    live = mask.float()
    if loss_agg_mode == TOKEN_MEAN:
        return live / live.sum()
    if loss_agg_mode == SEQ_MEAN_TOKEN_MEAN:
        return live / (live.sum(dim=-1, keepdim=True) * len(mask))
    length = mask.shape[1] if loss_scale_factor is None else loss_scale_factor
    return live / (length * len(mask))
