"""Log-ratios between the current and the old policy."""

from __future__ import annotations

import torch

LOG_RATIO_BOUND = 20.0
"""Largest |log ratio| that enters an exponential, in nats; e^20 is 4.9e8."""


def masked_log_ratio(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return log pi_theta - log pi_old at live positions, 0 elsewhere.

    The mask comes before anything non-linear: NaN times a zero gradient is
    NaN, so a masked value must never reach an exponential. Types narrower
    than float32 are widened first: bfloat16 would turn a ratio of 1.02 at
    log-probability -5.3 into 1.

    Args:
        log_prob: Log-probabilities under the current policy, nats, `[batch, response]`.
        old_log_prob: The same under the policy that sampled.
        mask: Bool, `[batch, response]`.

    Returns:
        `[batch, response]`, nats, float32 (float64 for float64).
    """
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    return torch.where(mask, log_prob.to(dtype) - old_log_prob.to(dtype), 0.0)


def beyond_bound(log_ratio: torch.Tensor) -> torch.Tensor:
    """Tell where the log-ratio, nats, exceeds the bound and so carries no gradient."""
    return log_ratio.abs() > LOG_RATIO_BOUND


def bound_log_ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    """Bound the log-ratio, nats, to +-20."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def response_log_ratio(
    log_ratio: torch.Tensor, mask: torch.Tensor, *, per_token: bool = False
) -> torch.Tensor:
    """Log of the ratio of whole responses, summed in float64 and bounded to +-20.

    Args:
        log_ratio: Of every token, nats, 0 at masked ones, `[batch, response]`.
        mask: Bool, `[batch, response]`.
        per_token: The mean over a response's tokens, log of the geometric mean, instead of the sum.

    Returns:
        `[batch, 1]`, nats, of the type of `log_ratio`; 0 for a row without a live token.
    """
    total = log_ratio.sum(dim=-1, keepdim=True, dtype=torch.float64)
    if per_token:
        total = total / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return bound_log_ratio(total).to(log_ratio.dtype)


def mean_drift(
    log_prob: torch.Tensor, last_log_prob: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Distance between the policy and the one that gave the last responses.

    Args:
        log_prob: Of these responses' tokens under the current policy, nats, `[batch, response]`.
        last_log_prob: The same under the policy that gave them.
        mask: Bool, `[batch, response]`.

    Returns:
        Mean of |difference| over live tokens, nats, `[batch]` float64; 0 for a row without any.
    """
    difference = torch.where(mask, log_prob.double() - last_log_prob.double(), 0.0).abs()
    return difference.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
