"""A loss per token together with its derivative, and the clipped surrogate of PPO.

The losses of this project are elementwise in the log-ratio and their
derivatives are known in closed form. Evaluating both at once, without
autograd's intermediate tensors, takes about half the time and memory of
building the same graph operation by operation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch


class TokenLoss(NamedTuple):
    """Loss of every token and its slope.

    Attributes:
        values: Loss l_t, `[batch, response]`.
        slopes: d l_t / d log pi_theta(token t), `[batch, response]`.
    """

    values: torch.Tensor
    slopes: torch.Tensor

    def scaled(self, weights: torch.Tensor) -> TokenLoss:
        """Multiply by constant weights of the same shape."""
        return TokenLoss(self.values * weights, self.slopes * weights)


def clipped_surrogate(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_ratio_low: float | torch.Tensor,
    clip_ratio_high: float | torch.Tensor,
    clip_ratio_c: float = math.inf,
) -> TokenLoss:
    """Clipped surrogate of every token, negated (arXiv 1707.06347), with its dual clip.

    l_t = -min(r_t A_t, clip(r_t, 1 - clip_ratio_low, 1 + clip_ratio_high) A_t)
    and where A_t < 0 at most -clip_ratio_c A_t (dual clip, arXiv 1912.09729, Eq. 5)

    The slope is -r_t A_t where that product is the value, else 0.

    Args:
        log_ratio: Bounded log-ratio, nats, `[batch, response]`.
        advantages: `[batch, response]`.
        clip_ratio_low: Distance of the lower bound from 1, in [0, 1); one, or `[batch, response]`.
        clip_ratio_high: Distance of the upper bound from 1, at least 0; one, or as above.
        clip_ratio_c: Largest ratio of tokens with a negative advantage, above 1.
    """
    ratio = log_ratio.exp()
    surrogate = ratio * -advantages
    clipped = ratio.clamp_(min=1.0 - clip_ratio_low).clamp_(max=1.0 + clip_ratio_high)
    clipped.mul_(-advantages)
    values = torch.maximum(surrogate, clipped)
    slopes = surrogate.masked_fill_(clipped > surrogate, 0.0)
    if clip_ratio_c < math.inf:
        largest = torch.where(advantages < 0, -clip_ratio_c * advantages, math.inf)
        slopes.masked_fill_(values > largest, 0.0)
        values = torch.minimum(values, largest)
    return TokenLoss(values, slopes)


def weighted_log_prob(
    weights: torch.Tensor, advantages: torch.Tensor, log_prob: torch.Tensor
) -> TokenLoss:
    """REINFORCE with a weight that has no gradient: l_t = -w A_t log pi, with the slope -w A_t.

    Args:
        weights: `[batch, response]`, or `[batch, 1]` for one a response.
        advantages: `[batch, response]`.
        log_prob: log pi_theta, nats, `[batch, response]`.
    """
    slopes = -weights * advantages
    return TokenLoss(slopes * log_prob, slopes)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, log_prob: torch.Tensor, values: torch.Tensor, slopes: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(slopes)
        return values.view_as(values)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        # Autograd itself casts to the type of `log_prob`.
        return grad_output * slopes, None, None


def attach(log_prob: torch.Tensor, loss: TokenLoss) -> torch.Tensor:
    """Put a loss per token into the graph of the log-probabilities, `[batch, response]`.

    Returns:
        The values, `[batch, response]`; their gradient with respect to `log_prob` is the slopes.
    """
    return _Attach.apply(log_prob, loss.values, loss.slopes)  # type: ignore[no-any-return]
