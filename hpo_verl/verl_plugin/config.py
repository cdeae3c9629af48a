"""Typed settings that a recipe reaches by `_target_`; verl checks them on the driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import PolicyLossConfig

from hpo_verl.algorithms.bapo import BAPOSettings
from hpo_verl.algorithms.hapo import HAPOSettings
from hpo_verl.algorithms.mhpo import MHPOSettings

_DEFAULTS = MHPOSettings()
_HAPO = HAPOSettings()
_BAPO = BAPOSettings()


@dataclass
class MHPOPolicyLossConfig(PolicyLossConfig):
    """verl's `policy_loss` section with the settings of the loss `mhpo`.

    Attributes:
        loss_mode: Registered name of the loss.
        c: Bound of the modified log-ratio, nats, in (0, 20].
        k_pos: Exponent of the hazard of ratios above 1, greater than 0.
        lambda_pos: Scale of that hazard, greater than 0.
        k_neg: Exponent of the hazard of ratios below 1, greater than 0.
        lambda_neg: Scale of that hazard, greater than 0.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    loss_mode: str = "mhpo"
    c: float = _DEFAULTS.c
    k_pos: float = _DEFAULTS.k_pos
    lambda_pos: float = _DEFAULTS.lambda_pos
    k_neg: float = _DEFAULTS.k_neg
    lambda_neg: float = _DEFAULTS.lambda_neg

    def __post_init__(self) -> None:
        MHPOSettings(self.c, self.k_pos, self.lambda_pos, self.k_neg, self.lambda_neg)


@dataclass
class InformedPolicyLossConfig(PolicyLossConfig):
    """A `policy_loss` section whose loss needs more than verl passes to a loss.

    Attributes:
        batch_info: What a worker knows of the batch at hand, filled there before each call as
            verl fills `global_batch_info`; no setting.
    """

    batch_info: dict[str, Any] = field(init=False, repr=False, default_factory=dict)


@dataclass
class HAPOPolicyLossConfig(InformedPolicyLossConfig):
    """verl's `policy_loss` section with the settings of the loss `hapo`.

    Attributes:
        loss_mode: Registered name of the loss.
        entropy_pivot: Quantile of log entropy where h is 0, in [0, 1].
        adv_beta: Scale of the advantage redistribution, in [0, 1].
        clip_alpha: Scale of the adaptive clip, in [0, 1].
        repo_compatible: Sign and neutral zone of the public code.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    loss_mode: str = "hapo"
    entropy_pivot: float = _HAPO.entropy_pivot
    adv_beta: float = _HAPO.adv_beta
    clip_alpha: float = _HAPO.clip_alpha
    repo_compatible: bool = _HAPO.repo_compatible

    def __post_init__(self) -> None:
        HAPOSettings(self.entropy_pivot, self.adv_beta, self.clip_alpha, self.repo_compatible)


@dataclass
class BAPOPolicyLossConfig(InformedPolicyLossConfig):
    """verl's `policy_loss` section with the settings of the loss `bapo`.

    Attributes:
        loss_mode: Registered name of the loss.
        positive_share: Share that positive tokens are to reach, in [0, 1].
        clip_low_start: First lower bound of the ratio, in [0, 1].
        clip_low_end: Largest lower bound, to 1.
        clip_low_step: Step of the lower bound, greater than 0.
        clip_high_start: First upper bound of the ratio, at least 1.
        clip_high_end: Largest upper bound.
        clip_high_step: Step of the upper bound, greater than 0.
        repo_compatible: Sums and order of the public code.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    loss_mode: str = "bapo"
    positive_share: float = _BAPO.positive_share
    clip_low_start: float = _BAPO.clip_low_start
    clip_low_end: float = _BAPO.clip_low_end
    clip_low_step: float = _BAPO.clip_low_step
    clip_high_start: float = _BAPO.clip_high_start
    clip_high_end: float = _BAPO.clip_high_end
    clip_high_step: float = _BAPO.clip_high_step
    repo_compatible: bool = _BAPO.repo_compatible

    def __post_init__(self) -> None:
        BAPOSettings(
            self.positive_share,
            self.clip_low_start,
            self.clip_low_end,
            self.clip_low_step,
            self.clip_high_start,
            self.clip_high_end,
            self.clip_high_step,
            self.repo_compatible,
        )
