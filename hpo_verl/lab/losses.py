"""From an algorithm's recipe to its loss per token.

The functions are those of `hpo_verl.core` and `hpo_verl.algorithms`; losses that are verl's own
stand beside this file, one each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from hpo_verl.algorithms.aepo_advantage import aepo_clip_loss
from hpo_verl.algorithms.bapo import BAPOSettings, bapo_loss, contributions, find_clip_bounds
from hpo_verl.algorithms.hapo import HAPOSettings, entropy_deviation, hapo_loss
from hpo_verl.algorithms.hpo import hpo_loss
from hpo_verl.algorithms.mhpo import MHPOSettings, mhpo_loss
from hpo_verl.core.settings import parse_settings, require_number
from hpo_verl.core.surrogate import TokenLoss
from hpo_verl.lab.gspo import gspo_loss
from hpo_verl.lab.sapo import sapo_loss
from hpo_verl.lab.vanilla import vanilla_loss

ACTOR = "actor_rollout_ref.actor"
POLICY_LOSS = f"{ACTOR}.policy_loss"
# verl's default, read where a recipe does not set it.
_CLIP_RATIO_C = 3.0
SettingsT = TypeVar("SettingsT")


class MiniBatch(NamedTuple):
    """The rows of a mini-batch that have an advantage; the others would add nothing to a loss.

    Attributes:
        log_ratio: Nats, `[rows, response]`; bounded to 20 for every loss but GSPO's.
        old_log_prob: Under the policy that sampled, nats, `[rows, response]`.
        advantages: `[rows, response]`, 0 at masked tokens.
        mask: Bool, `[rows, response]`.
        deviation: `entropy_deviation` of the whole rollout batch, for HAPO; else None.
    """

    log_ratio: torch.Tensor
    old_log_prob: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    deviation: torch.Tensor | None


LossOfTokens = Callable[[MiniBatch], TokenLoss]
Deviation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def select(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """Value of a dotted key, or the default."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def _clip_range(config: dict[str, Any]) -> tuple[float, float]:
    low = select(config, f"{ACTOR}.clip_ratio_low")
    high = select(config, f"{ACTOR}.clip_ratio_high")
    require_number(f"{ACTOR}.clip_ratio_low", low, 0.0, 1.0)
    require_number(f"{ACTOR}.clip_ratio_high", high, 0.0)
    return float(low), float(high)


def _settings(settings_type: type[SettingsT], config: dict[str, Any]) -> SettingsT:
    section = select(config, POLICY_LOSS)
    given = {key: value for key, value in section.items() if key not in ("_target_", "loss_mode")}
    return parse_settings(settings_type, given, POLICY_LOSS)


def _vanilla(config: dict[str, Any]) -> LossOfTokens:
    low, high = _clip_range(config)
    dual = select(config, f"{ACTOR}.clip_ratio_c", _CLIP_RATIO_C)
    require_number(f"{ACTOR}.clip_ratio_c", dual, 1.0, open_low=True)
    return lambda batch: vanilla_loss(batch.log_ratio, batch.advantages, low, high, dual)


def _hpo(config: dict[str, Any]) -> LossOfTokens:
    low, high = _clip_range(config)
    return lambda batch: hpo_loss(batch.log_ratio, batch.advantages, low, high)


def _mhpo(config: dict[str, Any]) -> LossOfTokens:
    settings = _settings(MHPOSettings, config)
    return lambda batch: mhpo_loss(batch.log_ratio, batch.advantages, settings)


def _gspo(config: dict[str, Any]) -> LossOfTokens:
    low, high = _clip_range(config)
    return lambda batch: gspo_loss(batch.log_ratio, batch.advantages, batch.mask, low, high)


def _sapo(config: dict[str, Any]) -> LossOfTokens:
    tau_pos = select(config, f"{ACTOR}.tau_pos")
    tau_neg = select(config, f"{ACTOR}.tau_neg")
    require_number(f"{ACTOR}.tau_pos", tau_pos, 0.0, open_low=True)
    require_number(f"{ACTOR}.tau_neg", tau_neg, 0.0, open_low=True)
    return lambda batch: sapo_loss(batch.log_ratio, batch.advantages, tau_pos, tau_neg)


def _bapo(config: dict[str, Any]) -> LossOfTokens:
    settings = _settings(BAPOSettings, config)

    def loss(batch: MiniBatch) -> TokenLoss:
        sums = contributions(
            batch.log_ratio, batch.old_log_prob, batch.advantages, batch.mask, settings
        )
        bounds = find_clip_bounds(sums.tolist(), settings)
        return bapo_loss(batch.log_ratio, batch.advantages, bounds.low, bounds.high)

    return loss


def _hapo(config: dict[str, Any]) -> LossOfTokens:
    settings, (low, high) = _settings(HAPOSettings, config), _clip_range(config)

    def loss(batch: MiniBatch) -> TokenLoss:
        assert batch.deviation is not None  # noqa: S101 - for the type checker
        deviation = torch.where(batch.mask, batch.deviation, 0.0)
        return hapo_loss(batch.log_ratio, batch.advantages, deviation, low, high, settings)

    return loss


def _aepo_clip(config: dict[str, Any]) -> LossOfTokens:
    low, high = _clip_range(config)
    return lambda batch: aepo_clip_loss(batch.log_ratio, batch.advantages, low, high)


LOSSES: dict[str, Callable[[dict[str, Any]], LossOfTokens]] = {
    "vanilla": _vanilla,
    "hpo": _hpo,
    "mhpo": _mhpo,
    "gspo": _gspo,
    "sapo": _sapo,
    "bapo": _bapo,
    "hapo": _hapo,
    "aepo_clip": _aepo_clip,
}
"""From an algorithm's recipe to its loss per token."""


def read_deviation(loss_mode: str, config: dict[str, Any]) -> Deviation | None:
    """What a loss needs of the whole rollout batch's entropies, from entropy and mask.

    Args:
        loss_mode: Key of `LOSSES`.
        config: The recipe.

    Returns:
        HAPO's `entropy_deviation`; None for the others.
    """
    if loss_mode != "hapo":
        return None
    settings = _settings(HAPOSettings, config)
    return lambda entropy, mask: entropy_deviation(entropy, mask, settings)
