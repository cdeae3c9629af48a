"""Hysteretic policy optimisation: HPO and A-HPO (arXiv 2605.30201).

    J = (1/N) sum_i (1/L) sum_t min(r_it w(A_i) A_i, clip(r_it, 1 - e_low, 1 + e_high) w(A_i) A_i)
    w(A) = 1 for A > 0, alpha for A < 0;   L = mean length of the responses
    HPO: alpha fixed;   A-HPO: alpha = clip(n+ / n-, alpha_min, 1)

A_i is GRPO's group-relative advantage, r_it the token's importance ratio, n+
and n- the numbers of responses of the rollout batch whose score lies above and
below their group's mean: with a positive and a negative advantage, unless a KL
penalty in the rewards makes others.

The paper fixes w, L and A-HPO's ratio of counts. It leaves open, and this
module decides: token-level ratio, clip 0.2 / 0.2, dual clip off, counts over
the whole rollout batch, advantages normalised by the standard deviation,
alpha_min 0.1. (1/N) sum_i (1/L) sum_t is the mean over all tokens.

Not of the paper, and off by default: a weight for A > 0; alpha on a line from
`alpha` to `alpha_end`; alpha_t = ema alpha_{t-1} + (1 - ema) alpha; the mean of
the other responses as the baseline, A_i n / (n - 1) (RLOO, arXiv 2402.14740,
and verl's `rloo`); L over the whole rollout batch, which then divides the
advantages; and the weight in front of another estimator's advantages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.groups import GroupAdvantages
from hpo_verl.core.settings import require_choice, require_number
from hpo_verl.errors import ConfigError

ZERO_ADVANTAGE_CHOICES = ("ignore", "negative")
BASELINES = ("mean", "leave_one_out")
LENGTHS = ("mini_batch", "rollout", "rollout_with_spread")


@dataclass(frozen=True)
class FixedWeight:
    """The weight of HPO, under `algorithm.hpo`.

    Attributes:
        alpha: Weight of negative advantages, in [0, 1].
        alpha_end: The same at the last step, linear in between; None for a constant.
        positive_weight: Weight of positive advantages, at least 0.
    """

    alpha: float = 0.6
    alpha_end: float | None = None
    positive_weight: float = 1.0

    def __post_init__(self) -> None:
        require_number("algorithm.hpo.alpha", self.alpha, 0.0, 1.0)
        if self.alpha_end is not None:
            require_number("algorithm.hpo.alpha_end", self.alpha_end, 0.0, 1.0)
        require_number("algorithm.hpo.positive_weight", self.positive_weight, 0.0)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the weight reads of `Rollout.extras`."""
        return () if self.alpha_end is None else ("progress",)

    def weight(self, positives: int, negatives: int, extras: Mapping[str, Any]) -> float:
        """Return alpha at this step, whatever the counts."""
        if self.alpha_end is None:
            return float(self.alpha)
        progress = extras["progress"]
        return (1.0 - progress) * self.alpha + progress * self.alpha_end


@dataclass(frozen=True)
class AdaptiveWeight:
    """The weight of A-HPO, under `algorithm.hpo`.

    Attributes:
        alpha_min: Lower bound of the weight of negative advantages, in [0, 1].
        ema: Share of the last step's weight in this step's, in [0, 0.999].
        positive_weight: Weight of positive advantages, at least 0.
    """

    alpha_min: float = 0.1
    ema: float = 0.0
    positive_weight: float = 1.0

    def __post_init__(self) -> None:
        require_number("algorithm.hpo.alpha_min", self.alpha_min, 0.0, 1.0)
        require_number("algorithm.hpo.ema", self.ema, 0.0, 0.999)
        require_number("algorithm.hpo.positive_weight", self.positive_weight, 0.0)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the weight reads of `Rollout.extras`."""
        return ("memory",) if self.ema else ()

    def weight(self, positives: int, negatives: int, extras: Mapping[str, Any]) -> float:
        """Return clip(n+ / n-, alpha_min, 1), 1 without negatives, averaged over steps."""
        counted = 1.0
        if negatives:
            counted = min(max(positives / negatives, self.alpha_min), 1.0)
        if not self.ema or (last := extras["memory"].get("alpha")) is None:
            return counted
        return self.ema * last + (1.0 - self.ema) * counted


@dataclass(frozen=True)
class GroupSettings:
    """How both count, centre and normalise, under `algorithm.hpo`.

    Attributes:
        zero_advantage: Whether failed responses (reward <= 0) of groups with equal rewards
            count as negatives (`negative`) or not (`ignore`). With a fixed alpha it changes
            logged counts only.
        baseline: Mean of the group, or of its other responses.
        length: Responses that L is the mean of: those of a mini-batch, of the whole rollout batch,
            or of its groups with a spread of rewards.
    """

    zero_advantage: str = "ignore"
    baseline: str = "mean"
    length: str = "mini_batch"

    def __post_init__(self) -> None:
        require_choice("algorithm.hpo.zero_advantage", self.zero_advantage, ZERO_ADVANTAGE_CHOICES)
        require_choice("algorithm.hpo.baseline", self.baseline, BASELINES)
        require_choice("algorithm.hpo.length", self.length, LENGTHS)


@dataclass(frozen=True)
class HPOSettings(FixedWeight, GroupSettings):
    """Settings of HPO."""

    def __post_init__(self) -> None:
        FixedWeight.__post_init__(self)
        GroupSettings.__post_init__(self)


@dataclass(frozen=True)
class AHPOSettings(AdaptiveWeight, GroupSettings):
    """Settings of A-HPO."""

    def __post_init__(self) -> None:
        AdaptiveWeight.__post_init__(self)
        GroupSettings.__post_init__(self)


def weigh(
    rollout: base.Rollout,
    result: base.Advantages,
    settings: FixedWeight | AdaptiveWeight,
) -> base.Advantages:
    """Weight advantages by their sign, one weight per batch.

    Args:
        rollout: What they were made of.
        result: Per response or per token; its `positives` and `negatives`, where given, are
            those behind alpha. Otherwise a response counts by the sum of its tokens' advantages.
        settings: Of the weight.

    Returns:
        The same with the weight, and with the counts behind it.
    """
    values = result.values
    of_session = values
    if values.dim() > 1:
        of_session = rollout.per_session(values.sum(dim=-1)) / rollout.lengths().clamp(min=1)
    positives, negatives = int((of_session > 0).sum()), int((of_session < 0).sum())
    if result.positives is not None and result.negatives is not None:
        positives, negatives = result.positives, result.negatives
    alpha = settings.weight(positives, negatives, rollout.extras)
    return result._replace(
        values=values.clamp(min=0) * settings.positive_weight + values.clamp(max=0) * alpha,
        unweighted=of_session,
        alpha=alpha,
        positives=positives,
        negatives=negatives,
        memory={**result.memory, **({"alpha": alpha} if "memory" in settings.needs else {})},
    )


def mean_length(rollout: base.Rollout, group: GroupAdvantages, settings: GroupSettings) -> float:
    """Return L, tokens, over the rollout batch; over all of it where no group has a spread."""
    lengths = rollout.mask.sum(dim=-1)
    counted = lengths > 0
    if settings.length == "rollout_with_spread":
        alive = counted & ~rollout.to_outputs(group.zero_spread)
        counted = alive if bool(alive.any()) else counted
    return max(float(lengths[counted].sum()), 1.0) / max(int(counted.sum()), 1)


def hysteretic_advantages(
    rollout: base.Rollout, settings: HPOSettings | AHPOSettings
) -> base.Advantages:
    """Group-relative advantages, the negative ones damped by one weight per batch.

    Returns:
        One advantage per response, `[batch]` float64, and the counts behind the weight. With
        `length` other than `mini_batch` they are divided by L.
    """
    group = rollout.grouped()
    advantages = group.advantages
    if settings.baseline == "leave_one_out":
        size = torch.bincount(rollout.groups, weights=rollout.live.double())[rollout.groups]
        advantages = advantages * size / (size - 1).clamp(min=1)
    positives = int((group.signs > 0).sum())
    negatives = int((group.signs < 0).sum())
    if settings.zero_advantage == "negative":
        scores = rollout.rewards if rollout.scores is None else rollout.scores
        negatives += int((group.zero_spread & (scores <= 0)).sum())
    plain = base.Advantages(advantages, positives=positives, negatives=negatives)
    result = weigh(rollout, plain, settings)
    if settings.length == "mini_batch":
        return result
    length = mean_length(rollout, group, settings)
    return result._replace(values=result.values / length, statistics={"mean_length": length})


def _check(config: Mapping[str, Any]) -> None:
    """Refuse an L of the rollout batch with another divisor, and another divisor without it."""
    section = config["algorithm"].get("hpo") or {}
    actor = config["actor_rollout_ref"]["actor"]
    length, mode = section.get("length", LENGTHS[0]), actor.get("loss_agg_mode")
    factor, norm = actor.get("loss_scale_factor"), base.SEQ_MEAN_TOKEN_SUM_NORM
    setting = f"algorithm.hpo.length = {length!r}"
    path = "actor_rollout_ref.actor"
    if length == LENGTHS[0]:
        if mode == norm and actor["policy_loss"].get("loss_mode") == LOSS.name:
            raise ConfigError(
                f"{path}.loss_agg_mode = {mode!r}: policy_loss.loss_mode = {LOSS.name!r} takes "
                f"{base.TOKEN_MEAN} with {setting}; set it to {' or '.join(LENGTHS[1:])}"
            )
        return
    if mode != norm or factor != 1:
        raise ConfigError(
            f"{setting}: the advantages carry 1 / L, so {path}.loss_agg_mode must be {norm} and "
            f"{path}.loss_scale_factor 1, not {mode!r} and {factor!r}"
        )
    for key in ("use_kl_loss", "entropy_coeff"):
        if actor.get(key):
            raise ConfigError(
                f"{path}.{key} = {actor[key]!r}: with {setting} verl would sum that term over a "
                "response without 1 / L; switch one of them off"
            )


LOSS = base.Loss(
    "hpo",
    base.clipped_loss,
    aggregations=(base.TOKEN_MEAN, base.SEQ_MEAN_TOKEN_SUM_NORM),
    clips=True,
    dual_clips=True,
    proportional=True,
)


def _algorithm(name: str, weighted: str, settings: type[Any], weight: type[Any]) -> base.Algorithm:
    return base.Algorithm(
        name,
        ("2605.30201",),
        f"{base.CLIP}, A < 0 weighted by {weighted}",
        base.TOKEN_MEAN,
        base.Estimator(
            name,
            hysteretic_advantages,
            settings,
            section="hpo",
            weights_by_sign=True,
            check=_check,
            weight=base.SignWeight(weight, weigh),
        ),
        LOSS,
    )


A_HPO = _algorithm("a_hpo", "clip(n+/n-, alpha_min, 1)", AHPOSettings, AdaptiveWeight)
ALGORITHMS = (A_HPO, _algorithm("hpo", "alpha", HPOSettings, FixedWeight))
