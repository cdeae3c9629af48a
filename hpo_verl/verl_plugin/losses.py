"""The policy losses of this project, as verl calls them.

verl calls a loss on every micro-batch in every actor process. The algorithms
return a loss per token; checks, masking, rollout weights, aggregation and
metrics are the same for all and happen here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from hpo_verl.algorithms.aepo_advantage import aepo_clip_loss
from hpo_verl.algorithms.bapo import BAPOSettings, bapo_loss
from hpo_verl.algorithms.catalog import LOSS_AGG_MODES
from hpo_verl.algorithms.hapo import HAPOSettings, hapo_loss
from hpo_verl.algorithms.hpo import hpo_loss
from hpo_verl.algorithms.mhpo import MHPOSettings, mhpo_loss
from hpo_verl.core.masking import as_bool_mask, nonempty_rows, require_finite
from hpo_verl.core.ratios import (
    LOG_RATIO_BOUND,
    beyond_bound,
    bound_log_ratio,
    masked_log_ratio,
)
from hpo_verl.core.settings import require_number
from hpo_verl.core.surrogate import TokenLoss, attach
from hpo_verl.errors import ConfigError, DataError, EnvironmentCheckError

ACTOR = "actor_rollout_ref.actor"

ENGINE_VENDOR = "VERL_ENGINE_VENDOR"
"""verl's environment variable; the value `hpo` selects `mini_batch.MiniBatchEngine`."""

ENTROPY_DEVIATION = "entropy_deviation"
"""Field of TransferQueue, and key of `batch_info`, with HAPO's h of every token."""

CLIP_BOUNDS = "clip_bounds"
"""Key of `batch_info` with BAPO's bounds of the mini-batch."""

LOSS_SETTINGS = {"mhpo": MHPOSettings, "bapo": BAPOSettings, "hapo": HAPOSettings}
"""Losses that have settings of their own under `policy_loss`."""

INFORMED_CONFIGS = {
    "bapo": "hpo_verl.verl_plugin.config.BAPOPolicyLossConfig",
    "hapo": "hpo_verl.verl_plugin.config.HAPOPolicyLossConfig",
}
"""Losses that read `batch_info`, and the `policy_loss._target_` that has it."""

CLIPPED_LOSSES = ("hpo", "hapo", "aepo_clip")
"""Losses that read `clip_ratio_low` and `clip_ratio_high`."""

SettingsT = TypeVar("SettingsT")


class MicroBatch(NamedTuple):
    """A checked micro-batch, float32 and clean at masked places.

    Attributes:
        log_ratio: Bounded, nats, `[batch, response]`.
        advantages: `[batch, response]`.
        mask: Bool, `[batch, response]`.
        tokens: Number of live tokens.
        kl: Mean of -log ratio before the bound, nats.
        beyond: Bool, where the bound holds the log-ratio; None if nowhere.
    """

    log_ratio: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    tokens: int
    kl: float
    beyond: torch.Tensor | None


def require_aggregation(loss_mode: str, loss_agg_mode: str) -> None:
    """Refuse an aggregation under which a loss of ours would be another objective.

    Args:
        loss_mode: Name of the loss; only ours are restricted.
        loss_agg_mode: verl's name of the aggregation.

    Raises:
        ConfigError: Names the loss and the mode.
    """
    allowed = LOSS_AGG_MODES.get(loss_mode)
    if allowed is not None and loss_agg_mode not in allowed:
        raise ConfigError(
            f"{ACTOR}.loss_agg_mode = {loss_agg_mode!r}: "
            f"policy_loss.loss_mode = {loss_mode!r} permits {' and '.join(allowed)} only"
        )


def clip_range(config: Any) -> tuple[float, float]:
    """Read the distances of the clip bounds from 1.

    Args:
        config: verl's actor section; `clip_ratio` stands in for an absent side.

    Returns:
        `clip_ratio_low` in [0, 1] and `clip_ratio_high` >= 0.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """
    sides = []
    for name, largest in (("clip_ratio_low", 1.0), ("clip_ratio_high", math.inf)):
        value = config.get(name, None)
        if value is None:
            name, value = "clip_ratio", config.get("clip_ratio", None)
        require_number(f"{ACTOR}.{name}", value, 0.0, largest)
        sides.append(float(value))
    return sides[0], sides[1]


def loss_settings(settings_type: type[SettingsT], policy_loss: Any) -> SettingsT:
    """Read the settings of a loss; those that verl's own PolicyLossConfig lacks are the defaults.

    Args:
        settings_type: One of the values of `LOSS_SETTINGS`.
        policy_loss: verl's `policy_loss` section, typed or not.

    Returns:
        The settings.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """
    defaults = dataclasses.asdict(settings_type())  # type: ignore[call-overload]
    given = {} if policy_loss is None else policy_loss
    return settings_type(**{key: given.get(key, value) for key, value in defaults.items()})


def batch_info(loss_mode: str, config: Any, key: str, needed: str) -> Any:
    """Return what a worker was told of the batch beyond the arguments of a loss.

    Args:
        loss_mode: Name of the loss, for the message.
        config: verl's actor config.
        key: Name in `policy_loss.batch_info`.
        needed: What would provide it, for the message.

    Raises:
        ConfigError: Nobody provided it.
    """
    known = config.get("policy_loss", None)
    value = None if known is None else (known.get("batch_info", None) or {}).get(key)
    if value is None:
        raise ConfigError(
            f"policy_loss.loss_mode = {loss_mode!r} needs {needed}, "
            f"and policy_loss._target_ = {INFORMED_CONFIGS[loss_mode]}"
        )
    return value


def prepare(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
) -> MicroBatch:
    """Check a micro-batch, mask it, and bound its log-ratio.

    Args:
        old_log_prob: `[batch, response]`, nats.
        log_prob: `[batch, response]`, nats.
        advantages: `[batch, response]`.
        response_mask: Bool or {0, 1}, `[batch, response]`.

    Returns:
        The micro-batch, without a graph.

    Raises:
        DataError: Shapes differ, the mask holds another value, or a live value is not finite.
    """
    tensors = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
    for name, tensor in tensors.items():
        if tensor.shape != response_mask.shape:
            raise DataError(
                f"{name} {tuple(tensor.shape)} must have the shape of response_mask "
                f"{tuple(response_mask.shape)}"
            )
    mask = as_bool_mask(response_mask)
    log_ratio = masked_log_ratio(log_prob.float(), old_log_prob.float(), mask)
    advantages = torch.where(mask, advantages.float(), 0.0)
    if mask.numel() == 0:
        return MicroBatch(log_ratio, advantages, mask, 0, 0.0, None)

    # One transfer from the device; NaN and infinity show in the extremes.
    low, high, a_low, a_high, total, count = torch.stack(
        [*log_ratio.aminmax(), *advantages.aminmax(), log_ratio.sum(), mask.sum()]
    ).tolist()
    if not all(map(math.isfinite, (low, high, a_low, a_high))):
        for name, tensor in tensors.items():
            require_finite(name, tensor, mask)
    beyond = None
    if max(-low, high) > LOG_RATIO_BOUND:
        beyond = beyond_bound(log_ratio)
        log_ratio = bound_log_ratio(log_ratio)
    return MicroBatch(log_ratio, advantages, mask, int(count), -total / max(count, 1), beyond)


def global_counts(info: dict[str, Any], mask: torch.Tensor) -> dict[str, Any]:
    """Complete verl's counts of the global mini-batch so that none of them is 0.

    Args:
        info: `config.global_batch_info`; counts are absent where verl does not know them.
        mask: Bool, `[batch, response]`.

    Returns:
        Keyword arguments of verl's `agg_loss`. With one rank, absent counts are those of the
        micro-batch; an empty mini-batch counts as 1, which makes its loss 0 and not 0/0.
    """
    counts = dict(info)
    if counts.get("dp_size", 1) == 1:
        if counts.get("batch_num_tokens") is None:
            counts["batch_num_tokens"] = int(mask.sum())
        if counts.get("global_batch_size") is None:
            counts["global_batch_size"] = int(nonempty_rows(mask).sum())
    for key in ("batch_num_tokens", "global_batch_size"):
        if counts.get(key) is not None:
            counts[key] = max(counts[key], 1)
    return counts


def _hpo(batch: MicroBatch, config: Any) -> TokenLoss:
    return hpo_loss(batch.log_ratio, batch.advantages, *clip_range(config))


def _mhpo(batch: MicroBatch, config: Any) -> TokenLoss:
    settings = loss_settings(MHPOSettings, config.get("policy_loss", None))
    return mhpo_loss(batch.log_ratio, batch.advantages, settings)


def _bapo(batch: MicroBatch, config: Any) -> TokenLoss:
    needed = f"the sums of the whole mini-batch: {ENGINE_VENDOR} = hpo in the workers' environment"
    bounds = batch_info("bapo", config, CLIP_BOUNDS, needed)
    return bapo_loss(batch.log_ratio, batch.advantages, bounds.low, bounds.high)


def _hapo(batch: MicroBatch, config: Any) -> TokenLoss:
    needed = "the tokens' entropies: a trainer.v1.trainer_mode of ours, hpo_sync for example"
    deviation = batch_info("hapo", config, ENTROPY_DEVIATION, needed)
    if deviation.shape != batch.mask.shape:
        raise DataError(
            f"{ENTROPY_DEVIATION} {tuple(deviation.shape)} must have the shape of response_mask "
            f"{tuple(batch.mask.shape)}"
        )
    require_finite(ENTROPY_DEVIATION, deviation, batch.mask)
    deviation = torch.where(batch.mask, deviation.float(), 0.0)
    settings = loss_settings(HAPOSettings, config.policy_loss)
    return hapo_loss(batch.log_ratio, batch.advantages, deviation, *clip_range(config), settings)


def _aepo_clip(batch: MicroBatch, config: Any) -> TokenLoss:
    return aepo_clip_loss(batch.log_ratio, batch.advantages, *clip_range(config))


TOKEN_LOSSES: dict[str, Callable[[MicroBatch, Any], TokenLoss]] = {
    "hpo": _hpo,
    "mhpo": _mhpo,
    "bapo": _bapo,
    "hapo": _hapo,
    "aepo_clip": _aepo_clip,
}
"""What an algorithm makes of a clean micro-batch and verl's actor config."""


def make_policy_loss(loss_mode: str) -> Callable[..., tuple[torch.Tensor, dict[str, float]]]:
    """Give a loss per token verl's interface.

    Args:
        loss_mode: Key of `TOKEN_LOSSES`.

    Returns:
        A function for `register_policy_loss`.
    """

    def policy_loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = LOSS_AGG_MODES[loss_mode][0],
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        from verl.trainer.ppo.core_algos import agg_loss

        if config is None:
            raise ConfigError(f"policy loss {loss_mode!r}: verl's actor config is missing")
        require_aggregation(loss_mode, loss_agg_mode)
        with torch.no_grad():
            batch = prepare(old_log_prob, log_prob, advantages, response_mask)
            loss = TOKEN_LOSSES[loss_mode](batch, config)
            bounded = 0
            if batch.beyond is not None:
                loss = TokenLoss(loss.values, loss.slopes.masked_fill(batch.beyond, 0.0))
                bounded = int(batch.beyond.sum())
            stopped = int(((loss.slopes == 0) & (loss.values != 0)).sum())
            if rollout_is_weights is not None:
                loss = loss.scaled(torch.where(batch.mask, rollout_is_weights.float(), 0.0))
        aggregated = agg_loss(
            loss_mat=attach(log_prob, loss),
            loss_mask=batch.mask,
            loss_agg_mode=loss_agg_mode,
            **global_counts(config.global_batch_info, batch.mask),
        )
        tokens = max(batch.tokens, 1)
        return aggregated, {
            "actor/pg_clipfrac": stopped / tokens,
            "actor/ppo_kl": batch.kl,
            "actor/pg_clipfrac_lower": 0.0,
            "actor/log_ratio_bounded_fraction": bounded / tokens,
        }

    policy_loss.__name__ = policy_loss.__qualname__ = loss_mode
    return policy_loss


LOSSES = {loss_mode: make_policy_loss(loss_mode) for loss_mode in TOKEN_LOSSES}


def register() -> None:
    """Register the losses with verl; a second call changes nothing.

    Raises:
        EnvironmentCheckError: Another package holds one of the names; verl itself would
            silently replace that loss.
    """
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss

    for name, loss in LOSSES.items():
        existing = POLICY_LOSS_REGISTRY.get(name, loss)
        if existing is not loss:
            raise EnvironmentCheckError(
                f"policy loss {name!r} is already registered by {existing.__module__}"
            )
        register_policy_loss(name)(loss)
