"""Heterogeneous adaptive policy optimization, HAPO (arXiv 2509.16591).

h_t in [-1, 1] says how uncertain the policy was at token t: the logarithm of its
entropy H, measured from a high quantile Q of all tokens and scaled on each side.

    h_t = (log H_t - Q) / (max log H - Q)   above Q
          (log H_t - Q) / (Q - min log H)   below Q                    (Eq. 4-6)
    A_i  = (R_i - mean_g) / std_g, mean and std over the tokens of the group
    A'_t = A_i (1 + beta h_t)  if h_t > 0 and r_t leaves the neutral zone,
                               or h_t <= 0 and r_t stays in it;  A_i otherwise
    l_t  = -min(r_t A'_t, clip(r_t, 1 - e_low', 1 + e_high') A'_t)
    e_low' = e_low (1 - alpha h_t)  if h_t <= 0,   e_high' = e_high (1 + alpha h_t)  if h_t > 0

The neutral zone is [1 - e_low / 2, 1 + e_high / 2]. The paper divides log H - Q by
its standard deviation first, which cancels.

Eq. 6 as printed, and the public code, turn the sign of the lower branch round, so
that h_t >= 0 everywhere and tokens of low entropy are treated as uncertain: their
advantage grows and their upper bound widens, against the paper's text. The text
is the default; `repo_compatible` gives the other sign, and the neutral zone of
the public code, halfway to the adapted bounds e_low' and e_high'.

A token is sampled at the temperature T (1 + tau h_t), with Q and the extremes of the
last step, which checkpoints keep; at T in the first one. It takes the rollout `hf`:
the public code patches vLLM's sampler. So tau is 0 by default; the paper's is 0.1, the
code's 0.05. Decided here: H is that at T, as in verl's old-policy pass; h is bounded to
[-1, 1], as in the code; the ratio's old policy is that at T, not the one that sampled.

The public code's dual clip is `clip_ratio_c` = 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.groups import STD_EPSILON
from hpo_verl.core.settings import require_flag, require_number
from hpo_verl.core.surrogate import TokenLoss, clipped_surrogate

DEVIATION = "entropy_deviation"
"""The field with h of every token."""

LOG_ENTROPY = "hapo_log_entropy"
"""In the memory: the quantile and the extremes of the last step's log entropies."""

SMALLEST_ENTROPY = 1e-8
"""In nats; smaller entropies count as this much, so that their logarithm is finite."""


@dataclass(frozen=True)
class HAPOAdvantageSettings:
    """Settings of the token-level group average and of sampling, under `algorithm.hapo`.

    Attributes:
        advantage_limit: A group with an |A| of at least this gets GRPO's advantage; above 0.
        temperature_scale: Scale tau of the temperature per token, in [0, 0.9]; 0 switches it off.
        temperature_pivot: Quantile of log entropy where the temperature is the rollout's, in
            [0, 1].
    """

    advantage_limit: float = 5.0
    temperature_scale: float = 0.0
    temperature_pivot: float = 0.8

    def __post_init__(self) -> None:
        path = "algorithm.hapo"
        require_number(f"{path}.advantage_limit", self.advantage_limit, 0.0, open_low=True)
        require_number(f"{path}.temperature_scale", self.temperature_scale, 0.0, 0.9)
        require_number(f"{path}.temperature_pivot", self.temperature_pivot, 0.0, 1.0)

    @property
    def needs(self) -> tuple[str, ...]:
        """What a temperature per token needs."""
        return ("entropy",) if self.temperature_scale else ()


@dataclass(frozen=True)
class HAPOSettings:
    """Settings of the loss, under `actor_rollout_ref.actor.policy_loss`.

    Attributes:
        entropy_pivot: Quantile of log entropy where h is 0, in [0, 1].
        adv_beta: Scale of the advantage redistribution, in [0, 1]; 0 switches it off.
        clip_alpha: Scale of the adaptive clip, in [0, 1]; 0 switches it off.
        repo_compatible: Sign and neutral zone of the public code instead of the paper's text.
    """

    entropy_pivot: float = 0.8
    adv_beta: float = 1.0
    clip_alpha: float = 1.0
    repo_compatible: bool = False

    def __post_init__(self) -> None:
        path = "actor_rollout_ref.actor.policy_loss"
        for name in ("entropy_pivot", "adv_beta", "clip_alpha"):
            require_number(f"{path}.{name}", getattr(self, name), 0.0, 1.0)
        require_flag(f"{path}.repo_compatible", self.repo_compatible)


def token_group_advantages(
    rollout: base.Rollout, settings: HAPOAdvantageSettings
) -> base.Advantages:
    """Group-relative advantages whose mean and deviation run over tokens.

    mean_g = sum_i |o_i| R_i / sum_i |o_i|, and std_g likewise (divisor: the number
    of tokens); so the advantages of a group sum to 0 over its tokens. A group with
    an |A| of at least `advantage_limit` gets GRPO's advantages.

    Returns:
        `[batch]` float64; 0 for groups whose rewards are all equal.
    """
    grpo, codes = rollout.grouped(), rollout.groups
    rewards = rollout.rewards.double().masked_fill(~rollout.live, 0.0)
    lengths = rollout.lengths()
    zeros = rewards.new_zeros(int(codes.max()) + 1 if len(codes) else 0)

    tokens = zeros.index_add(0, codes, lengths).clamp(min=1)
    mean = zeros.index_add(0, codes, rewards * lengths) / tokens
    advantages = rewards - mean.index_select(0, codes)
    if rollout.normalize_by_std:
        square = zeros.index_add(0, codes, advantages.square() * lengths)
        std = (square / tokens).sqrt()
        advantages = advantages / (std + STD_EPSILON).index_select(0, codes)
    advantages = advantages.masked_fill(grpo.zero_spread | ~rollout.live, 0.0)

    largest = zeros.scatter_reduce(0, codes, advantages.abs(), "amax")
    beyond = (largest >= settings.advantage_limit).index_select(0, codes)
    found = base.Advantages(torch.where(beyond, grpo.advantages, advantages))
    if not settings.temperature_scale or not rollout.mask.any():
        return found
    entropies = log_entropies(rollout.extras["entropy"], rollout.mask, settings.temperature_pivot)
    return found._replace(memory={LOG_ENTROPY: [float(one) for one in entropies[1:]]})


def token_temperature(
    memory: Mapping[str, Any], settings: HAPOAdvantageSettings
) -> base.TokenTemperature | None:
    """T (1 + tau h) by the last step's log entropies; T before there are any."""
    if not settings.temperature_scale:
        return None
    pivot, low, high = memory.get(LOG_ENTROPY, (0.0, 0.0, 0.0))
    return base.TokenTemperature(settings.temperature_scale, pivot, low, high)


def log_entropies(
    entropy: torch.Tensor, mask: torch.Tensor, pivot: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logarithms of the live tokens' entropies, `[tokens]` float32, of which there is one at least.

    Behind them their quantile, the token whose rank is nearest; the smallest and the largest.
    """
    live = entropy[mask].float().clamp(min=SMALLEST_ENTROPY).log()
    return live, live.kthvalue(1 + round(pivot * (len(live) - 1))).values, live.min(), live.max()


def entropy_deviation(
    entropy: torch.Tensor, mask: torch.Tensor, settings: HAPOSettings
) -> torch.Tensor:
    """Place the entropy of every token, nats, `[batch, response]`, between the batch's extremes.

    Returns:
        h in [-1, 1], `[batch, response]` float32; with `repo_compatible` in [0, 1].
        0 at masked tokens, and on a side of the quantile where all tokens lie on it.
    """
    deviation = entropy.new_zeros(entropy.shape, dtype=torch.float32)
    if mask.any():
        live, pivot, low, high = log_entropies(entropy, mask, settings.entropy_pivot)
        distance = live - pivot
        sign = -1.0 if settings.repo_compatible else 1.0
        scale = torch.where(distance > 0, high - pivot, sign * (pivot - low))
        # Where a scale is 0 so are the distances on that side.
        deviation[mask] = distance / torch.where(scale == 0, 1.0, scale)
    return deviation


def hapo_loss(batch: base.TokenBatch, settings: HAPOSettings) -> TokenLoss:
    """HAPO's loss of every token.

    Bounds and weights carry no gradient: the slope is that of the clipped surrogate.
    """
    (clip_ratio_low, clip_ratio_high), deviation = batch.clip_range, batch.extras[DEVIATION]
    low = clip_ratio_low * (1.0 - settings.clip_alpha * deviation.clamp(max=0.0))
    high = clip_ratio_high * (1.0 + settings.clip_alpha * deviation.clamp(min=0.0))
    zone = (low, high) if settings.repo_compatible else (clip_ratio_low, clip_ratio_high)
    ratio = batch.log_ratio.exp()
    neutral = (ratio >= 1.0 - zone[0] / 2) & (ratio <= 1.0 + zone[1] / 2)
    redistributed = (deviation > 0) ^ neutral
    weights = torch.where(redistributed, 1.0 + settings.adv_beta * deviation, 1.0)
    advantages = batch.advantages * weights
    return clipped_surrogate(batch.log_ratio, advantages, low, high, batch.clip_ratio_c)


ALGORITHMS = (
    base.Algorithm(
        "hapo",
        ("2509.16591",),
        f"{base.CLIP}, A and both bounds adapted to each token's entropy",
        base.TOKEN_MEAN,
        base.Estimator(
            "hapo",
            token_group_advantages,
            HAPOAdvantageSettings,
            section="hapo",
            token_temperature=token_temperature,
        ),
        base.Loss(
            "hapo",
            hapo_loss,
            HAPOSettings,
            aggregations=(base.TOKEN_MEAN,),
            clips=True,
            dual_clips=True,
            proportional=True,
            token_fields={DEVIATION: entropy_deviation},
        ),
    ),
)
