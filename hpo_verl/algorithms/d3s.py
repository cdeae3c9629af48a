"""Dynamic dual-level down-sampling, D3S (arXiv 2509.22115).

    responses:  the N of the batch that maximise Var(A)
    tokens:     of those, the K with the largest |A_i| H_it
    schedule:   [N, K](p) = (1 - p) [N0, K0] + p [N1, K1],   p = training progress, 0 .. 1

A_i is GRPO's group-relative advantage, normalised in its own group and not
again after the selection; H_it is the entropy of the policy that sampled, at
token t of response i. What is dropped gets the advantage 0 and keeps its place
in the response mask: under a loss proportional to the advantage it then adds
neither value nor gradient, while the counts of tokens and responses that verl
divides by, fixed before and on other processes, stay true.

The paper gives no N and K that could be found beyond "less than 20 % of the
tokens"; this module decides: shares instead of counts (on average 14 % of all
tokens); one ranking of responses and one of tokens over the whole rollout
batch; ties by position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_number


@dataclass(frozen=True)
class D3SSettings:
    """Settings of D3S, under `algorithm.d3s`; all in (0, 1].

    Attributes:
        response_share_start: Share of the responses kept at the first step, N0.
        response_share_end: The same at the last step, N1.
        token_share_start: Share of the kept responses' tokens kept at the first step, K0.
        token_share_end: The same at the last step, K1.
    """

    response_share_start: float = 0.25
    response_share_end: float = 0.5
    token_share_start: float = 0.2
    token_share_end: float = 0.5

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            require_number(f"algorithm.d3s.{name}", share, 0.0, 1.0, open_low=True)

    def shares(self, progress: float) -> tuple[float, float]:
        """Shares of responses, and of the kept responses' tokens, at a progress from 0 to 1."""
        start, end = 1.0 - progress, progress
        return (
            start * self.response_share_start + end * self.response_share_end,
            start * self.token_share_start + end * self.token_share_end,
        )


def most_spread(values: torch.Tensor, count: int) -> torch.Tensor:
    """Find the `count` values with the largest variance.

    Such a set is always the k largest and the count - k smallest for some k.
    For let a chosen value lie between two that are not chosen: as a function
    of that one value the variance is convex, so moving it to one of the two
    does not lower it. The k is found by trying all of them on prefix sums.

    Args:
        values: `[batch]`.
        count: How many to take, 0 .. batch.

    Returns:
        Indices of the chosen values, `[count]` int64.
    """
    order = values.sort(stable=True).indices
    if count == 0:
        return order[:0]
    # The variance does not depend on the mean, and small sums round less.
    ascending = values.double()[order] - values.double().mean()
    size = len(ascending)
    zero = ascending.new_zeros(1)
    sums = torch.cat([zero, ascending.cumsum(0)])
    squares = torch.cat([zero, ascending.square().cumsum(0)])
    largest = torch.arange(count + 1, device=values.device)
    below, above = count - largest, size - largest
    total = sums[below] + sums[size] - sums[above]
    square = squares[below] + squares[size] - squares[above]
    k = int((square / count - (total / count).square()).argmax())
    return torch.cat([order[: count - k], order[size - k :]])


def kept_count(share: float, size: int, at_least: int) -> int:
    """Return the nearest integer to a share of `size` items, `at_least` if there are so many."""
    return min(size, max(at_least, int(share * size + 0.5)))


def down_sample(
    advantages: torch.Tensor,
    entropy: torch.Tensor,
    mask: torch.Tensor,
    settings: D3SSettings,
    progress: float,
    final: torch.Tensor | None = None,
) -> base.Advantages:
    """Keep the responses and tokens that carry most signal, and zero the others.

    At least two responses are kept, since the variance of one is 0 whatever it is, and at least
    one token.

    Args:
        advantages: Group-relative advantage of every response, `[batch]`.
        entropy: Entropy of every token's distribution, nats, `[batch, response]`.
        mask: Bool, `[batch, response]`; rows without a live token count for nothing.
        settings: Shares at the first and the last step.
        progress: 0 at the first step, 1 at the last.
        final: Of `base.Rollout`: the outputs of a session are kept or dropped together.

    Returns:
        Advantages `[batch, response]` float64, 0 at dropped and masked places, and the kept
        fractions of the live responses and of their tokens.
    """
    response_share, token_share = settings.shares(progress)
    session = torch.arange(len(mask), device=mask.device) if final is None else final
    rows = session[mask.any(dim=-1)].unique()
    wanted = kept_count(response_share, len(rows), at_least=2)
    kept_rows = rows[most_spread(advantages[rows], wanted)]
    kept = mask & torch.isin(session, kept_rows).unsqueeze(-1)

    weights = advantages.double()[session].unsqueeze(-1)
    candidates = kept.flatten().nonzero().squeeze(-1)
    scores = (weights.abs() * entropy.masked_fill(~mask, 0.0)).flatten()[candidates]
    count = kept_count(token_share, len(candidates), at_least=1)
    best = scores.sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(mask).flatten()
    chosen[candidates[best]] = True
    return base.Advantages(
        torch.where(chosen.view_as(mask), weights, 0.0),
        statistics={
            "d3s_response_fraction": len(kept_rows) / max(len(rows), 1),
            "d3s_token_fraction": count / max(int(mask.sum()), 1),
        },
    )


def _advantage(rollout: base.Rollout, settings: D3SSettings) -> base.Advantages:
    entropy, progress = rollout.extras["entropy"], rollout.extras["progress"]
    advantages = rollout.grouped().advantages
    return down_sample(advantages, entropy, rollout.mask, settings, progress, rollout.final)


ALGORITHMS = (
    base.Algorithm(
        "d3s",
        ("2509.22115",),
        f"{base.CLIP}, A = 0 outside the N responses of largest Var(A) and their K tokens of "
        "largest |A| H",
        base.TOKEN_MEAN,
        base.Estimator(
            "d3s",
            _advantage,
            D3SSettings,
            section="d3s",
            needs=("entropy", "progress"),
            drops_tokens=True,
        ),
    ),
)
