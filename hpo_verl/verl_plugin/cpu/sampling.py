"""Draws tokens from logits, each from its own row alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from hpo_verl.algorithms.base import TokenTemperature

# Tokens whose probabilities are summed in the logits' own precision. The vocabulary is padded to
# whole chunks, so that vector instructions round no entry of a row otherwise than its neighbour.
CHUNK = 256


def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
    by_token: TokenTemperature | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a given uniform.

    The draw depends on nothing but its own row of logits, `[batch, vocabulary]`, and its uniform in
    [0, 1), so neither the order nor the company of requests changes a sample. A temperature of 0
    means greedy; `top_k` below 1 keeps the whole vocabulary; `top_p` works within the top-k.
    With `by_token` each row has a temperature of its own, unless greedy.

    Returns:
        Tokens `[batch]`, and their log-probabilities `[batch]` in nats, float32, under the
        distribution that they were drawn from (greedy: at temperature 1, unrestricted).
    """
    rows, vocabulary = logits.shape
    scaled: Any = logits / temperature if temperature not in (0, 1) else logits
    if temperature and by_token is not None:
        scaled = scaled / adapted(entropies(scaled), by_token)[:, None]
    no_tokens_before: Any = None
    if temperature and top_k >= 1:
        scaled = TopKLogitsWarper(top_k)(no_tokens_before, scaled)
    if temperature and top_p < 1:
        scaled = TopPLogitsWarper(top_p)(no_tokens_before, scaled)
    largest = scaled.amax(-1, keepdim=True)
    weights = _below(scaled, largest).exp_().unflatten(-1, (-1, CHUNK))
    # Float64 from here on: in float32 the cumulative values of rare tokens would be equal.
    mass = weights.sum(-1).double()
    cumulative = mass.cumsum(-1)
    total = cumulative[:, -1:]
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        target = uniforms.double()[:, None] * total
        chunk = _first_above(cumulative, target)
        before = cumulative.gather(-1, chunk) - mass.gather(-1, chunk)
        inside = weights[torch.arange(rows), chunk.squeeze(-1)].double().cumsum(-1)
        within = _first_above(inside, target - before)
        token = (chunk * CHUNK + within).clamp(max=vocabulary - 1)
    log_prob = (scaled.gather(-1, token) - largest).double() - total.log()
    return token.squeeze(-1), log_prob.squeeze(-1).float()


def entropies(scaled: torch.Tensor) -> torch.Tensor:
    """Entropy of each row's distribution, nats, `[batch]` float64."""
    below = _below(scaled, scaled.amax(-1, keepdim=True)).unflatten(-1, (-1, CHUNK))
    weights = below.exp()
    total = weights.sum(-1).double().sum(-1)
    # An entry without mass is -inf.
    weighted = (weights * below.clamp(min=torch.finfo(below.dtype).min)).sum(-1).double().sum(-1)
    return total.log() - weighted / total


def adapted(entropy: torch.Tensor, rule: TokenTemperature) -> torch.Tensor:
    """Factor 1 + scale h on the temperature of each row, in the entropy's shape, float32."""
    distance = entropy.clamp(min=1e-8).log() - rule.pivot
    above, below = rule.high - rule.pivot, rule.pivot - rule.low
    scale = torch.where(distance > 0, above, below).to(distance.dtype)
    deviation = torch.where(scale > 0, distance / scale.where(scale > 0, 1.0), 0.0)
    return (1.0 + rule.scale * deviation.clamp(-1.0, 1.0)).float()


def _below(scaled: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Distance of each entry from the largest, padded to whole chunks by -inf."""
    rows, vocabulary = scaled.shape
    padded = scaled.new_full((rows, -(-vocabulary // CHUNK) * CHUNK), -torch.inf)
    torch.sub(scaled, largest, out=padded[:, :vocabulary])
    return padded


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index of the first value above the target, `[batch, 1]`.

    Where rounding carried the target up to the last value, of the first that reaches that.
    """
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    found = torch.searchsorted(cumulative, target.contiguous(), right=True)
    # Beyond all of them is only what is no number.
    return torch.minimum(found, last).clamp(max=cumulative.shape[-1] - 1)
