"""Sample responses with a cache of keys and values; every response has a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hpo_verl.lab.policy import Policy, Prompts

# Rows that have ended are taken out once they are this share; taking out copies the cache.
_DROP_SHARE = 0.2


class Responses(NamedTuple):
    """Sampled responses.

    Attributes:
        tokens: `[batch, time]` int64, the padding token after the end.
        mask: Bool, `[batch, time]`; the end token counts.
        log_probs: Under the policy that sampled, nats, `[batch, time]`; 0 beyond the end.
        entropy: Of the distribution that each token was drawn from, nats, `[batch, time]`.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor


def noise(seeds: Sequence[tuple[int, ...]], length: int) -> torch.Tensor:
    """Uniform numbers of every sequence, from its own seed.

    Args:
        seeds: One per sequence.
        length: Numbers per sequence.

    Returns:
        `[sequences, length]` float32 in [0, 1).
    """
    rows = [np.random.default_rng(seed).random(length, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def sample(policy: Policy, prompts: Prompts, uniforms: torch.Tensor) -> Responses:
    """Draw one response per row of `uniforms` at temperature 1.

    Args:
        policy: To sample from.
        prompts: Each has the same number of responses, in a row.
        uniforms: `[prompts * group, time]` in [0, 1), from `noise`; `time` is the longest response.

    Returns:
        Responses that end with the end token, or after `time` tokens.
    """
    uniforms = uniforms.to(policy.device)
    count, time = uniforms.shape
    state = policy.read_prompts(prompts).repeated(count // len(prompts.lengths))
    prompt_length = state.keys[0].shape[2]
    capacity = prompt_length + time
    keys, values = ([_grown(x, capacity) for x in part] for part in (state.keys, state.values))
    visible = _visible(state.lengths, capacity, prompt_length)

    tokens = torch.full((count, time), policy.pad, device=policy.device)
    mask = torch.zeros((count, time), dtype=torch.bool, device=policy.device)
    log_probs = torch.zeros((count, time), device=policy.device)
    entropy = torch.zeros((count, time), device=policy.device)
    rows = torch.arange(count, device=policy.device)
    going = torch.ones(count, dtype=torch.bool, device=policy.device)
    hidden, lengths = state.hidden, state.lengths
    for t in range(time):
        log_p = policy.next_token_logits(hidden).log_softmax(dim=-1)
        drawn, chosen, spread = _draw(log_p, uniforms[rows, t])
        live = rows[going]
        tokens[live, t], mask[live, t] = drawn[going], True
        log_probs[live, t], entropy[live, t] = chosen[going], spread[going]
        going &= drawn != policy.end
        left = int(going.sum())
        if left == 0 or t + 1 == time:
            break
        if left < (1 - _DROP_SHARE) * len(rows):
            keys, values = ([x[going] for x in part] for part in (keys, values))
            rows, lengths, drawn = rows[going], lengths[going], drawn[going]
            visible = None if visible is None else visible[going]
            going = going[going]
        now = prompt_length + t
        seen = None if visible is None else visible[..., : now + 1]
        hidden = policy.decode(drawn, lengths + t, keys, values, now, seen)
    return Responses(tokens, mask, log_probs, entropy)


def _draw(
    log_p: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token by inversion of the distribution, its log-probability, and the entropy."""
    p = log_p.exp()
    cumulative = p.cumsum(dim=-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)
    # Rounding may carry the target up to the last cumulative value.
    last_possible = p.shape[-1] - 1 - (p > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    drawn = torch.minimum(drawn, last_possible)
    return drawn.squeeze(1), log_p.gather(-1, drawn).squeeze(1), -(p * log_p).nansum(dim=-1)


def _grown(x: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return a cache with room for `capacity` tokens that starts with `x`."""
    grown = x.new_zeros(*x.shape[:2], capacity, x.shape[3])
    grown[:, :, : x.shape[2]] = x
    return grown


def _visible(lengths: torch.Tensor, capacity: int, prompt_length: int) -> torch.Tensor | None:
    """Which places of the cache a row sees; None where no prompt has padding."""
    if bool((lengths == prompt_length).all()):
        return None
    places = torch.arange(capacity, device=lengths.device)
    return ((places < lengths[:, None]) | (places >= prompt_length))[:, None, None]
