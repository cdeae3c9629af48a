"""The policy losses of this project, as verl calls them.

verl calls a loss on every micro-batch in every actor process. The algorithms
return a loss per token; checks, masking, rollout weights, aggregation and
metrics are the same for all and happen here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hpo_verl.algorithms.base import Loss, TokenBatch
from hpo_verl.algorithms.registry import LOSSES as RECORDS
from hpo_verl.algorithms.registry import OUR_LOSSES
from hpo_verl.core.masking import as_bool_mask, require_finite
from hpo_verl.core.ratios import (
    LOG_RATIO_BOUND,
    beyond_bound,
    bound_log_ratio,
    masked_log_ratio,
)
from hpo_verl.core.settings import require_number
from hpo_verl.core.surrogate import TokenLoss, attach
from hpo_verl.errors import ConfigError, DataError, EnvironmentCheckError
from hpo_verl.verl_plugin import extras

ACTOR = "actor_rollout_ref.actor"

ENGINE_VENDOR = "VERL_ENGINE_VENDOR"
"""verl's environment variable; the value `VENDOR` selects `mini_batch.MiniBatchEngine`."""

VENDOR = "hpo"

STRATEGIES = ("fsdp", "fsdp2")
"""Strategies for which there is an engine of ours."""


class MicroBatch(NamedTuple):
    """A checked micro-batch: what a loss sees of it (float32, no graph), and its live tokens.

    `kl` is the mean of -log ratio before the bound, nats; `beyond` is true where the bound holds
    the log-ratio, None if nowhere.
    """

    tokens: TokenBatch
    live_tokens: int
    kl: float
    beyond: torch.Tensor | None


def require_aggregation(loss: Loss, loss_agg_mode: str) -> None:
    """Refuse, by a ConfigError, an aggregation under which the loss would be another objective."""
    if loss.aggregations and loss_agg_mode not in loss.aggregations:
        raise ConfigError(
            f"{ACTOR}.loss_agg_mode = {loss_agg_mode!r}: policy_loss.loss_mode = {loss.name!r} "
            f"permits {' and '.join(loss.aggregations)} only"
        )


def clip_range(config: Any) -> tuple[float, float]:
    """Read `clip_ratio_low` in [0, 1] and `clip_ratio_high` >= 0 of verl's actor section.

    `clip_ratio` stands in for an absent one; a bad one raises a ConfigError.
    """
    sides = []
    for name, largest in (("clip_ratio_low", 1.0), ("clip_ratio_high", math.inf)):
        value = config.get(name, None)
        if value is None:
            name, value = "clip_ratio", config.get("clip_ratio", None)
        require_number(f"{ACTOR}.{name}", value, 0.0, largest)
        sides.append(float(value))
    return sides[0], sides[1]


def dual_clip(config: Any) -> float:
    """Read `clip_ratio_c`, above 1, of verl's actor section; a bad one raises a ConfigError.

    It is infinite where no ratio can reach it.
    """
    value = config.get("clip_ratio_c", None)
    require_number(f"{ACTOR}.clip_ratio_c", value, 1.0, open_low=True)
    return float(value) if value < math.exp(LOG_RATIO_BOUND) else math.inf


def loss_settings(loss: Loss, policy_loss: Any) -> Any:
    """Read the settings of a loss from verl's `policy_loss`; None if the loss has none.

    Those that verl's own PolicyLossConfig lacks are the defaults; a bad one raises a ConfigError.
    """
    if loss.settings is None:
        return None
    given = {} if policy_loss is None else policy_loss
    defaults = {f.name: f.default for f in dataclasses.fields(loss.settings)}
    return loss.settings(**{key: given.get(key, value) for key, value in defaults.items()})


def selected_loss(policy_loss: Any) -> Loss | None:
    """Return the record of verl's `policy_loss.loss_mode`; None if the loss is unknown here."""
    return RECORDS.get(str(policy_loss.get("loss_mode", "vanilla")))


def loss_of(loss_function: Any) -> tuple[Loss, Any] | None:
    """Record and settings of the policy loss in verl's loss function; None without a record."""
    config = getattr(loss_function, "keywords", {}).get("config")
    policy_loss = getattr(config, "policy_loss", None)
    loss = None if policy_loss is None else selected_loss(policy_loss)
    return None if loss is None else (loss, loss_settings(loss, policy_loss))


def _token_extras(loss: Loss, mask: torch.Tensor) -> dict[str, Any]:
    """Take what a loss needs beyond verl's arguments from the channel, checked and masked."""
    who, found = f"policy_loss.loss_mode = {loss.name!r}", {}
    mode = "a trainer.v1.trainer_mode of ours, hpo_sync for example"
    for name in loss.fields:
        source = f"the tokens' entropies: {mode}"
        if name not in loss.token_fields:
            source = f"the model's head: {mode}, and {ENGINE_VENDOR} = {VENDOR} for the workers"
        values = extras.require(name, who, source)
        _require_shape(name, values, mask)
        require_finite(name, values, mask)
        found[name] = torch.where(mask, values.float(), 0.0)
    if loss.mini_batch_sums is not None:
        source = (
            f"the sums of the whole mini-batch: {ENGINE_VENDOR} = {VENDOR} in the workers' "
            "environment"
        )
        found[extras.MINI_BATCH] = extras.require(extras.MINI_BATCH, who, source)
    return found


def _require_shape(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> None:
    if tensor.shape != mask.shape:
        raise DataError(
            f"{name} {tuple(tensor.shape)} must have the shape of response_mask {tuple(mask.shape)}"
        )


def prepare(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
) -> MicroBatch:
    """Check a micro-batch, mask it, and bound its log-ratio.

    All are `[batch, response]`: log-probabilities in nats, and a mask of bool or of 0 and 1.

    Raises:
        DataError: Shapes differ, the mask holds another value, or a live value is not finite.
    """
    tensors = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
    for name, tensor in tensors.items():
        _require_shape(name, tensor, response_mask)
    mask = as_bool_mask(response_mask)
    log_ratio = masked_log_ratio(log_prob.float(), old_log_prob.float(), mask)
    advantages = torch.where(mask, advantages.float(), 0.0)
    tokens = TokenBatch(log_ratio, advantages, mask, torch.where(mask, old_log_prob.float(), 0.0))
    if mask.numel() == 0:
        return MicroBatch(tokens, 0, 0.0, None)

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
        tokens = tokens._replace(log_ratio=bound_log_ratio(log_ratio))
    return MicroBatch(tokens, int(count), -total / max(count, 1), beyond)


def _policy_loss(
    record: Loss,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str | None = None,
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Follow verl's interface of a policy loss: loss and metrics of a micro-batch."""
    from verl.trainer.ppo.core_algos import agg_loss

    assert record.token_loss is not None  # noqa: S101 - for the type checker
    if config is None:
        raise ConfigError(f"policy loss {record.name!r}: verl's actor config is missing")
    loss_agg_mode = loss_agg_mode or record.aggregations[0]
    require_aggregation(record, loss_agg_mode)
    settings = loss_settings(record, config.get("policy_loss", None))
    with torch.no_grad():
        batch = prepare(old_log_prob, log_prob, advantages, response_mask)
        mask = batch.tokens.mask
        tokens = batch.tokens._replace(extras=_token_extras(record, mask))
        if record.clips:
            tokens = tokens._replace(clip_range=clip_range(config))
        if record.dual_clips:
            tokens = tokens._replace(clip_ratio_c=dual_clip(config))
        loss = record.token_loss(tokens, settings)
        bounded = 0
        if batch.beyond is not None:
            loss = TokenLoss(loss.values, loss.slopes.masked_fill(batch.beyond, 0.0))
            bounded = int(batch.beyond.sum())
        stopped = (loss.slopes == 0) & (loss.values != 0)
        beyond_c = tokens.log_ratio > math.log(tokens.clip_ratio_c)
        lower = stopped & (tokens.advantages < 0) & beyond_c
        if rollout_is_weights is not None:
            loss = loss.scaled(torch.where(mask, rollout_is_weights.float(), 0.0))
    per_token, counts = attach(log_prob, loss), config.global_batch_info
    if batch.live_tokens:
        aggregated = agg_loss(per_token, mask, loss_agg_mode, **counts)
    else:
        # 0, with a graph. verl would divide 0 by 0 where the whole mini-batch is empty.
        aggregated = per_token[mask].sum()
    count = max(batch.live_tokens, 1)
    by_dual_clip = int(lower.sum())
    return aggregated, {
        "actor/pg_clipfrac": (int(stopped.sum()) - by_dual_clip) / count,
        "actor/ppo_kl": batch.kl,
        "actor/pg_clipfrac_lower": by_dual_clip / count,
        "actor/log_ratio_bounded_fraction": bounded / count,
    }


LOSSES: dict[str, Callable[..., tuple[torch.Tensor, dict[str, float]]]] = {
    name: functools.partial(_policy_loss, record) for name, record in OUR_LOSSES.items()
}


def register(core_algos: Any) -> None:
    """Register the losses with verl; a second call changes nothing."""
    for name, loss in LOSSES.items():
        # verl itself would silently replace the loss of another package.
        existing = core_algos.POLICY_LOSS_REGISTRY.get(name, loss)
        if existing is not loss:
            raise EnvironmentCheckError(
                f"policy loss {name!r} is already registered by {existing.__module__}"
            )
        core_algos.register_policy_loss(name)(loss)
