"""Entropy-regularized policy optimization, EPO (arXiv 2509.22576).

    L = L_PPO - lambda (mean_t H_t - beta_k mean_t P_t)
    P_t = max(0, H_t - k_high Hbar) + max(0, k_low Hbar - H_t)
    Hbar = mean over the past steps of the mean entropy of their tokens

H_t is the entropy of the policy at token t, nats, with its gradient; lambda is
`entropy_coeff`. The corridor [k_low Hbar, k_high Hbar] stands from the second step on, and
the history is kept in checkpoints. L_PPO is PPO's clip on GRPO's advantages.

The public code takes P_t = `penalty` outside the corridor and 0 inside: a constant, so it has no
gradient and shows in the logged loss alone. The distance, which acts, is the default here;
`repo_compatible` gives the constant. beta_k is the code's, over the progress p of the run:

    beta (1 - 0.2 (1 - exp(-4 p)))  for p <= 1/2,   0.8 beta exp(-6 (p - 1/2))  after

Sources: the public code (WujiangXu/EPO); the paper's own beta_k was not found, and `schedule` can
switch it off. Of its three pairs of bounds, 0.5 and 1.5 of its launch script are the default (its
config has 0.8 and 1.2, its two runs 0 and 2). lambda 0.001, beta 1 and penalty 0.1 agree.

Decided here: one corridor for all turns of a session, made of past steps alone, and for all
steps. The code has one for each turn, with the present step in its mean, and applies it to
micro-batches with a turn of the later half; it runs PPO with a critic as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_choice, require_flag, require_number

HISTORY = "entropy_history"
"""The field with Hbar, nats."""

SMOOTHING = "entropy_smoothing"
"""The field with beta_k; 0 at the first step, which has no history."""

PATH = "actor_rollout_ref.actor.policy_loss"


@dataclass(frozen=True)
class EPOHistorySettings:
    """Settings of the penalty's weight, under `algorithm.epo`.

    Attributes:
        smoothing: Weight beta of the penalty against the entropy, at least 0.
        schedule: `decay`: beta_k falls as in the public code; `constant`: it stays beta.
    """

    smoothing: float = 1.0
    schedule: str = "decay"

    def __post_init__(self) -> None:
        require_number("algorithm.epo.smoothing", self.smoothing, 0.0)
        require_choice("algorithm.epo.schedule", self.schedule, ("decay", "constant"))

    def weight(self, progress: float) -> float:
        """beta_k at a progress from 0 to 1."""
        if self.schedule == "constant":
            return self.smoothing
        if progress <= 0.5:
            return self.smoothing * (1.0 - 0.2 * (1.0 - math.exp(-4.0 * progress)))
        return self.smoothing * 0.8 * math.exp(-6.0 * (progress - 0.5))


@dataclass(frozen=True)
class EPOSettings:
    """Settings of the corridor, under `actor_rollout_ref.actor.policy_loss`.

    Attributes:
        corridor_low: Lower bound k_low, as a share of the history's mean, in [0, 1].
        corridor_high: Upper bound k_high, at least 1.
        per: `token`: P of every token; `response`: P of the mean entropy of its response.
        repo_compatible: P is `penalty` outside the corridor, without a gradient.
        penalty: That constant, nats, at least 0.
    """

    corridor_low: float = 0.5
    corridor_high: float = 1.5
    per: str = "token"
    repo_compatible: bool = False
    penalty: float = 0.1

    def __post_init__(self) -> None:
        require_number(f"{PATH}.corridor_low", self.corridor_low, 0.0, 1.0)
        require_number(f"{PATH}.corridor_high", self.corridor_high, 1.0)
        require_choice(f"{PATH}.per", self.per, ("token", "response"))
        require_flag(f"{PATH}.repo_compatible", self.repo_compatible)
        require_number(f"{PATH}.penalty", self.penalty, 0.0)


def advantages_with_history(rollout: base.Rollout, settings: EPOHistorySettings) -> base.Advantages:
    """GRPO's advantages, and the history of the mean entropy.

    Returns:
        Advantages, `[batch]` float64; the fields of the past steps' mean and of its weight; and
        the history with this step in it.
    """
    memory, mask = rollout.extras["memory"], rollout.mask
    mean, steps = memory.get("epo_entropy", 0.0), memory.get("epo_steps", 0.0)
    weight = settings.weight(rollout.extras["progress"]) if steps else 0.0
    kept = {}
    statistics = {"epo_smoothing": weight}
    if steps:
        statistics["epo_entropy_history"] = mean
    if bool(mask.any()):
        now = float(rollout.extras["entropy"][mask].double().mean())
        kept = {"epo_entropy": mean + (now - mean) / (steps + 1), "epo_steps": steps + 1}
    return base.Advantages(
        rollout.grouped().advantages,
        statistics=statistics,
        memory=kept,
        token_fields={
            HISTORY: mask.double() * mean,
            SMOOTHING: mask.double() * weight,
        },
    )


def corridor_penalty(
    entropy: torch.Tensor,
    mask: torch.Tensor,
    fields: Mapping[str, torch.Tensor],
    settings: EPOSettings,
) -> torch.Tensor:
    """beta_k P_t, nats, `[batch, response]`; with a gradient unless `repo_compatible`."""
    if settings.per == "response":
        total = entropy.masked_fill(~mask, 0.0).sum(dim=-1, keepdim=True)
        entropy = total / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    low = settings.corridor_low * fields[HISTORY]
    high = settings.corridor_high * fields[HISTORY]
    if settings.repo_compatible:
        outside = (entropy <= low) | (entropy >= high)
        return fields[SMOOTHING] * settings.penalty * outside
    return fields[SMOOTHING] * ((entropy - high).clamp(min=0.0) + (low - entropy).clamp(min=0.0))


ALGORITHMS = (
    base.Algorithm(
        "epo",
        ("2509.22576",),
        f"{base.CLIP}, entropy bonus less its distance from a corridor",
        base.TOKEN_MEAN,
        base.Estimator(
            "epo",
            advantages_with_history,
            EPOHistorySettings,
            section="epo",
            needs=("entropy", "memory", "progress"),
            gives=(HISTORY, SMOOTHING),
        ),
        base.Loss(
            "epo",
            base.clipped_loss,
            EPOSettings,
            aggregations=(base.TOKEN_MEAN, base.SEQ_MEAN_TOKEN_MEAN),
            clips=True,
            dual_clips=True,
            proportional=True,
            token_fields={HISTORY: None, SMOOTHING: None},
            entropy_penalty=corridor_penalty,
        ),
    ),
)
