"""Adaptive and asymmetric token-level advantage shaping, A3PO (arXiv 2512.21625).

    A_t = s+ A_i   at the share q+ of tokens that pi_old gave the lowest probability, for A_i > 0
    A_t = s- A_i   at the share q- of tokens that it gave the highest,                for A_i < 0
    A_t = A_i      elsewhere;   s(p) = 1 + (s - 1) (1 - p),   p = (step - 1) / (steps - 1)

Rare tokens of successes and likely tokens of failures count more, early most. A_i is GRPO's; a
share is one of the response's own tokens, rounded down, at least one.

Sources: the authors' code (txy77/Sample-Polarity-of-RLVR): ranking per response, 0.2 and 2 of
its scripts, PPO's clip 0.2 / 0.2 and the mean per response, without its KL term of 1e-3. There the
scales are constant (`decay: none`), and responses are told apart by reward, which is the sign of A
for rewards of 1 and 0. Its README says that the paper's scales decay over the training; how they do
was not found: the straight line to 1 is decided here. Ties go to the earlier token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_choice, require_number


@dataclass(frozen=True)
class A3POSettings:
    """Settings of A3PO, under `algorithm.a3po`.

    Attributes:
        positive_share: Share q+ of the tokens of a positive response, in (0, 1].
        positive_scale: Factor s+ at the first step, at least 0; 1 changes nothing.
        negative_share: Share q- of the tokens of a negative response, in (0, 1].
        negative_scale: Factor s- at the first step, at least 0.
        decay: `linear`: the factors reach 1 at the last step; `none`: they stay.
    """

    positive_share: float = 0.2
    positive_scale: float = 2.0
    negative_share: float = 0.2
    negative_scale: float = 2.0
    decay: str = "linear"

    def __post_init__(self) -> None:
        for sign in ("positive", "negative"):
            share, scale = f"{sign}_share", f"{sign}_scale"
            require_number(f"algorithm.a3po.{share}", getattr(self, share), 0.0, 1.0, open_low=True)
            require_number(f"algorithm.a3po.{scale}", getattr(self, scale), 0.0)
        require_choice("algorithm.a3po.decay", self.decay, ("linear", "none"))


def lowest(values: torch.Tensor, mask: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Choose the smallest live values of every row.

    Args:
        values: `[batch, response]`.
        mask: Bool, `[batch, response]`.
        shares: Of the row's live values, in (0, 1], `[batch]` float64.

    Returns:
        `[batch, response]` bool; at least one of every row that has a live value.
    """
    order = values.masked_fill(~mask, torch.inf).argsort(dim=-1, stable=True)
    ranks = order.argsort(dim=-1)
    counts = (shares * mask.sum(dim=-1)).floor().clamp(min=1)
    return mask & (ranks < counts.unsqueeze(-1))


def shaped_advantages(rollout: base.Rollout, settings: A3POSettings) -> base.Advantages:
    """GRPO's advantages, scaled at rare tokens of positives and likely tokens of negatives.

    Returns:
        `[batch, response]` float64, 0 at masked tokens; and the two factors.
    """
    remaining = 1.0 - rollout.extras["progress"] if settings.decay == "linear" else 1.0
    factors = [
        1.0 + (scale - 1.0) * remaining
        for scale in (settings.positive_scale, settings.negative_scale)
    ]
    advantages = rollout.to_outputs(rollout.grouped().advantages)
    mask, log_prob = rollout.mask, rollout.extras["old_log_prob"].double()

    def by_sign(positive: float, negative: float) -> torch.Tensor:
        of_positive = (advantages > 0).double()
        return of_positive * positive + (1.0 - of_positive) * negative

    rare_first = log_prob * by_sign(1.0, -1.0).unsqueeze(-1)
    shares = by_sign(settings.positive_share, settings.negative_share)
    chosen = lowest(rare_first.masked_fill(~mask, 0.0), mask, shares)
    weights = torch.where(chosen, by_sign(*factors).unsqueeze(-1), 1.0)
    return base.Advantages(
        (advantages.unsqueeze(-1) * weights).masked_fill(~mask, 0.0),
        statistics={"a3po_positive_scale": factors[0], "a3po_negative_scale": factors[1]},
    )


ALGORITHMS = (
    base.Algorithm(
        "a3po",
        ("2512.21625",),
        f"{base.CLIP}, A scaled at rare tokens of successes and likely tokens of failures",
        base.SEQ_MEAN_TOKEN_MEAN,
        base.Estimator(
            "a3po",
            shaped_advantages,
            A3POSettings,
            section="a3po",
            needs=("old_log_prob", "progress"),
        ),
    ),
)
