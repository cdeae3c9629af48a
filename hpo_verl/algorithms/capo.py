"""Curvature-aware policy optimization, CAPO (arXiv 2510.00819): tokens that upset are left out.

The model is taken for its head alone, a softmax of W h over the temperature, with the last hidden
state h. A token's own gradient of W, and what Adam would make of it in its next step, are

    g = A v h',   v = e_a - pi                      (a: the token, pi: the policy's probabilities)
    d = lr m / (sqrt(s) + eps),   m, s: Adam's averages with g as the next gradient, corrected

To second order that step changes the token's objective, and its policy, by

    m_H = <g, d> + A / 2 ((v'u)^2 - u'(diag(pi) - pi pi')u),   u = d h
    m_F = (v'u)^2 / 2

and the token's loss counts where hessian_low <= m_H <= hessian_high and m_F <= fisher_high;
elsewhere it is 0. The loss is PPO's clip, the advantages are GRPO's.

Sources: a note on the paper, and the public code (luckeciano/stable-pg-llm) for g, d, both terms
and the thresholds of CAPO, which belong to lr 1.5e-5; its Dr. CAPO has 1e-3 and 5e-4, its ReinCAPO
1e-5 and 0.1 (fisher, hessian). As there, d is g itself before the first step, since Adam's would be
its sign, which masks nearly everything, and so forever; and g is the token's own, not its share of
the mini-batch's.

Decided here: the averages are the optimizer's own of the head's weights (of the embedding's too,
where they are tied), not those of a second, modelled optimizer; weight decay is not part of d. Of
the vocabulary, the `top_tokens` likeliest count, with their exact probabilities, and the sampled
token always (the code: the likeliest alone, renormalised). A masked token stays in the counts of
the mean, so that splitting a mini-batch changes nothing (the code: left out of its response's). A
token without an advantage is kept. The ratio of later mini-batches is not part of g, as in the
code. Left out: the code's masks of whole responses and batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_integer, require_number
from hpo_verl.core.surrogate import TokenLoss
from hpo_verl.errors import ConfigError

PATH = "actor_rollout_ref.actor.policy_loss"
MASKED, HESSIAN, FISHER = "curvature_masked", "curvature_hessian", "curvature_fisher"
"""Fields: 1 where a token is left out, m_H and m_F."""

ELEMENTS = 1 << 23
"""Entries of g that are held at once, 32 MiB."""


@dataclass(frozen=True)
class CAPOSettings:
    """Settings of the loss, under `actor_rollout_ref.actor.policy_loss`.

    Attributes:
        hessian_low: Smallest m_H of a token that counts, at most `hessian_high`.
        hessian_high: Largest m_H of a token that counts.
        fisher_high: Largest m_F of a token that counts, above 0.
        top_tokens: How many of the likeliest tokens stand for the vocabulary; 0 for all of it.
    """

    hessian_low: float = -0.01
    hessian_high: float = 0.01
    fisher_high: float = 1e-4
    top_tokens: int = 50

    def __post_init__(self) -> None:
        require_number(f"{PATH}.hessian_low", self.hessian_low, float("-inf"))
        require_number(f"{PATH}.hessian_high", self.hessian_high, float("-inf"))
        if self.hessian_low > self.hessian_high:
            raise ConfigError(
                f"{PATH}.hessian_low = {self.hessian_low!r}: must be at most hessian_high = "
                f"{self.hessian_high!r}"
            )
        require_number(f"{PATH}.fisher_high", self.fisher_high, 0.0, open_low=True)
        require_integer(f"{PATH}.top_tokens", self.top_tokens, 0)


def likeliest(head: base.HeadTokens, count: int) -> torch.Tensor:
    """The likeliest tokens, the sampled one among them, `[tokens, count]`; all of them for 0."""
    vocabulary = head.logits.shape[-1]
    count = min(count or vocabulary, vocabulary)
    found = head.logits.topk(count, dim=-1).indices
    absent = (found != head.tokens.unsqueeze(-1)).all(dim=-1)
    found[:, -1] = torch.where(absent, head.tokens, found[:, -1])
    return found


def adam_step(
    gradient: torch.Tensor, rows: torch.Tensor, optimizer: base.HeadOptimizer
) -> torch.Tensor:
    """What Adam would add to rows of W, were the gradient the whole of the next one.

    Args:
        gradient: Of the objective, not of the loss, `[tokens, rows, hidden]`.
        rows: Of W, `[tokens, rows]`.
        optimizer: With the averages of the loss's gradient.
    """
    if optimizer.moments is None:
        return optimizer.lr * gradient
    (beta1, beta2), steps = optimizer.betas, optimizer.steps + 1
    first, second = (moment[rows].to(gradient.dtype) for moment in optimizer.moments)
    first = first.mul_(-beta1).add_(gradient, alpha=1.0 - beta1).div_(1.0 - beta1**steps)
    second = second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    root = second.div_(1.0 - beta2**steps).sqrt_().add_(optimizer.epsilon)
    return first.div_(root).mul_(optimizer.lr)


def curvature(
    head: base.HeadTokens, optimizer: base.HeadOptimizer, settings: CAPOSettings
) -> dict[str, torch.Tensor]:
    """m_H and m_F of every token, and whether one of them is out of its bounds, `[tokens]` each."""
    width = min(settings.top_tokens or head.logits.shape[-1], head.logits.shape[-1])
    size = max(1, ELEMENTS // (width * head.hidden.shape[-1]))
    parts = zip(*(tensor.split(size) for tensor in head), strict=True)
    found = [_curvature(base.HeadTokens(*part), optimizer, settings.top_tokens) for part in parts]
    hessian, fisher = (torch.cat(one) for one in zip(*found, strict=True))
    kept = (hessian >= settings.hessian_low) & (hessian <= settings.hessian_high)
    kept &= fisher <= settings.fisher_high
    return {MASKED: (~kept).to(hessian.dtype), HESSIAN: hessian, FISHER: fisher}


def _curvature(
    head: base.HeadTokens, optimizer: base.HeadOptimizer, top_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = likeliest(head, top_tokens)
    probabilities = (head.logits.gather(-1, rows) - head.logits.logsumexp(-1, keepdim=True)).exp()
    scores = (rows == head.tokens.unsqueeze(-1)).to(probabilities.dtype) - probabilities
    weighted = head.advantages.unsqueeze(-1) * scores
    gradient = weighted.unsqueeze(-1) * head.hidden.unsqueeze(-2)
    step = adam_step(gradient, rows, optimizer)
    change = torch.einsum("tkh,th->tk", step, head.hidden)
    square = (scores * change).sum(-1).square()
    mean = (probabilities * change).sum(-1)
    spread = (probabilities * change.square()).sum(-1) - mean.square()
    # <g, d> = (A v)'u, since g is the product of A v and h.
    linear = (weighted * change).sum(-1)
    return linear + 0.5 * head.advantages * (square - spread), 0.5 * square


def capo_loss(batch: base.TokenBatch, settings: CAPOSettings) -> TokenLoss:
    """PPO's loss of every token, 0 where the token is left out."""
    return base.clipped_loss(batch, settings).scaled(1.0 - batch.extras[MASKED])


ALGORITHMS = (
    base.Algorithm(
        "capo",
        ("2510.00819",),
        f"{base.CLIP}, 0 where Adam's step on the token would change too much",
        base.SEQ_MEAN_TOKEN_MEAN,
        loss=base.Loss(
            "capo",
            capo_loss,
            CAPOSettings,
            aggregations=(
                base.SEQ_MEAN_TOKEN_MEAN,
                base.TOKEN_MEAN,
                base.SEQ_MEAN_TOKEN_SUM_NORM,
            ),
            clips=True,
            dual_clips=True,
            selects=True,
            caveat="chooses by the advantages which tokens it leaves out",
            head_fields=base.HeadFields((MASKED, HESSIAN, FISHER), curvature),
        ),
    ),
)
