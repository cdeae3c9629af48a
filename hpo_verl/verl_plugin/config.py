"""Typed settings that a recipe reaches by `_target_`; verl checks them on the driver."""

from __future__ import annotations

from dataclasses import dataclass

from verl.workers.config import PolicyLossConfig

from hpo_verl.algorithms.mhpo import MHPOSettings

_DEFAULTS = MHPOSettings()


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
