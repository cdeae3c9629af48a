"""Exact sampling from next-token logits with temperature, top-k and top-p."""

from __future__ import annotations

import torch


def restrict_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set logits outside the top-k and the nucleus to -inf.

    Top-k comes first; top-p then keeps the smallest set of most probable
    tokens whose probability (renormalised within the top-k) reaches `top_p`,
    the token that crosses the bound included. Tokens that tie with the k-th
    stay.

    Args:
        logits: `[batch, vocabulary]`, already divided by the temperature.
        top_k: tokens; below 1 keeps the whole vocabulary.
        top_p: fraction in (0, 1]; 1 keeps the whole vocabulary.

    Returns:
        `[batch, vocabulary]`.
    """
    if 1 <= top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(dim=-1)
        outside = probability.cumsum(dim=-1) - probability >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits


def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a given uniform.

    The draw depends on nothing but its own row, so neither the order nor the
    company of requests changes a sample.

    Args:
        logits: `[batch, vocabulary]`.
        uniforms: `[batch]`, in [0, 1).
        temperature: 0 means greedy.
        top_k: see `restrict_logits`.
        top_p: see `restrict_logits`.

    Returns:
        Tokens `[batch]`, and their log-probabilities `[batch]` in nats, float32,
        under the distribution that they were drawn from (greedy: at temperature 1).
    """
    scaled = logits.double() / (temperature or 1.0)
    log_prob = restrict_logits(scaled, top_k, top_p).log_softmax(dim=-1)
    if temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        probability = log_prob.exp()
        cumulative = probability.cumsum(dim=-1)
        target = uniforms.double() * cumulative[:, -1]
        drawn = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
        # Rounding may carry the target up to the last cumulative value.
        last_possible = logits.shape[-1] - 1 - (probability > 0).flip(-1).int().argmax(dim=-1)
        token = torch.minimum(drawn, last_possible)
    return token, log_prob.gather(-1, token[:, None]).squeeze(-1).float()
