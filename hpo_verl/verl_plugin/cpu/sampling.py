"""Exact sampling from next-token logits with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingSettings:
    """Per-row sampling settings of one batch.

    Attributes:
        temperature: `[batch]`; 0 means greedy.
        top_k: `[batch]`, tokens; values below 1 keep the whole vocabulary.
        top_p: `[batch]`, fraction in (0, 1]; 1 keeps the whole vocabulary.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor


def restrict_logits(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Set logits outside the top-k and the nucleus to -inf.

    Top-k comes first; top-p then keeps the smallest set of most probable
    tokens whose probability (renormalised within the top-k) reaches `top_p`,
    the token that crosses the bound included. Tokens that tie with the k-th
    stay.

    Args:
        logits: `[batch, vocabulary]`, already divided by the temperature.
        settings: per-row settings.

    Returns:
        `[batch, vocabulary]`.
    """
    vocabulary = logits.shape[-1]
    limited = (settings.top_k >= 1) & (settings.top_k < vocabulary)
    if bool(limited.any()):
        rank = torch.where(limited, settings.top_k, vocabulary).clamp(max=vocabulary) - 1
        threshold = logits.sort(dim=-1, descending=True).values.gather(-1, rank[:, None])
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if bool((settings.top_p < 1).any()):
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(dim=-1)
        mass_before = probability.cumsum(dim=-1) - probability
        outside = (mass_before >= settings.top_p[:, None]) & (settings.top_p < 1)[:, None]
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, settings: SamplingSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a given uniform.

    The draw depends on nothing but its own row, so neither the order nor the
    company of requests changes a sample.

    Args:
        logits: `[batch, vocabulary]`.
        uniforms: `[batch]`, in [0, 1).
        settings: per-row settings.

    Returns:
        Tokens `[batch]`, and their log-probabilities `[batch]` in nats, float32,
        under the distribution that they were drawn from (for greedy rows: at
        temperature 1).
    """
    greedy = settings.temperature == 0
    temperature = torch.where(greedy, torch.ones_like(settings.temperature), settings.temperature)
    scaled = restrict_logits(logits.double() / temperature.double()[:, None], settings)
    log_prob = scaled.log_softmax(dim=-1)
    probability = log_prob.exp()
    cumulative = probability.cumsum(dim=-1)
    target = uniforms.double() * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    # Rounding may carry the target up to the last cumulative value.
    last_possible = logits.shape[-1] - 1 - (probability > 0).flip(-1).int().argmax(dim=-1)
    token = torch.where(greedy, logits.argmax(dim=-1), torch.minimum(drawn, last_possible))
    return token, log_prob.gather(-1, token[:, None]).squeeze(-1).float()
