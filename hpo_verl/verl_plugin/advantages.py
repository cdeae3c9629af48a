"""The estimators of this project, as verl calls them.

verl calls an estimator on the driver, with the whole batch of a step: the one place where every
response is visible. `separate_async` calls it with a part of the step at a time; the trainer then
hands over the parts before, and the estimator sees a step's worth of responses. The algorithms
return advantages and statistics; rewards, groups, settings and what an estimator needs beyond
verl's arguments are read here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from hpo_verl.algorithms.base import (
    REWARD,
    Advantages,
    Estimator,
    Rollout,
    SignWeight,
    TokenTemperature,
)
from hpo_verl.algorithms.registry import OUR_ESTIMATORS
from hpo_verl.core.masking import require_finite
from hpo_verl.core.settings import parse_settings, require_flag
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.estimator_input import (
    TOKEN_VALUES,
    group_codes,
    is_reward,
    joined,
    make_rollout,
)

logger = logging.getLogger(__name__)

_told: set[str] = set()

OUR_MODES = ("hpo_sync", "hpo_colocate_async", "hpo_separate_async")


class Estimate(NamedTuple):
    """One call of an estimator.

    Attributes:
        part: The responses that it was called with.
        labels: Their uids.
        rollout: What it saw: the earlier parts of a step's worth of responses, and this one.
        result: What it returned.
        advantages: Of the whole rollout, `[batch, response]` float32, 0 at masked tokens. The loss
            will see the last rows, those of the part.
    """

    part: Rollout
    labels: list[Hashable]
    rollout: Rollout
    result: Advantages
    advantages: torch.Tensor


def read_settings(estimator: Estimator, config: Mapping[str, Any] | None) -> Any:
    """Read the settings of an estimator from verl's `algorithm` section; None if it has none.

    A bad one raises a ConfigError.
    """
    if estimator.settings is None:
        return None
    values = None if config is None else config.get(estimator.section, None)
    return parse_settings(estimator.settings, values, f"algorithm.{estimator.section}")


def weight_in_front(
    estimator: Estimator, config: Mapping[str, Any] | None
) -> tuple[SignWeight, Any] | None:
    """Read the weight by sign that stands in front of an estimator, and its settings.

    It stands there where the section of an estimator that lends its weight is given beside
    another one of ours. Of several weights in a section, the keys tell which one is meant.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    if config is None or estimator.advantage is None or estimator.weights_by_sign:
        return None
    for section in dict.fromkeys(one.section for one in OUR_ESTIMATORS.values() if one.weight):
        values = config.get(section, None)
        if not values:
            continue
        offered = [
            one.weight for one in OUR_ESTIMATORS.values() if one.weight and one.section == section
        ]
        fitting = [w for w in offered if {f.name for f in fields(w.settings)} >= set(values)]
        weight = (fitting or offered)[0]
        return weight, parse_settings(weight.settings, values, f"algorithm.{section}")
    return None


def needs(estimator: Estimator, config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Names of what an estimator reads with its settings, and with a weight in front."""
    if estimator.advantage is None:
        return ()
    front = weight_in_front(estimator, config)
    given = (read_settings(estimator, config), front and front[1])
    return (*estimator.needs, *(name for one in given for name in getattr(one, "needs", ())))


def token_temperature(
    estimator: Estimator, config: Mapping[str, Any] | None, memory: Mapping[str, Any]
) -> TokenTemperature | None:
    """The rule for the temperature of every token after a step that left this memory, if any."""
    if estimator.token_temperature is None:
        return None
    return estimator.token_temperature(memory, read_settings(estimator, config))


def reward_names(estimator: Estimator, config: Mapping[str, Any] | None) -> list[str]:
    """Names under which the reward function must return numbers for the estimator."""
    return [name.removeprefix(REWARD) for name in filter(is_reward, needs(estimator, config))]


def normalizes_by_std(config: Mapping[str, Any] | None) -> bool:
    """Read `norm_adv_by_std_in_grpo` of verl's `algorithm` section, true or false."""
    normalize_by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    require_flag("algorithm.norm_adv_by_std_in_grpo", normalize_by_std)
    return normalize_by_std


def trainer_modes(estimator: Estimator, config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Trainer modes that provide what an estimator needs; empty for any, verl's own included.

    `config` is verl's `algorithm` section: with a KL penalty in the rewards, an estimator of ours
    needs the scores too, for signs and spread.
    """
    by_token = token_temperature(estimator, config, {}) is not None
    # In the others prompts are drawn and submitted long before the last step is known, and a
    # response must say which weights sampled it.
    if any((estimator.history, estimator.temperatures, estimator.openings, by_token)):
        return OUR_MODES[:1]
    needs_scores = estimator.advantage is not None and penalizes(config)
    return OUR_MODES if needs(estimator, config) or needs_scores else ()


def penalizes(config: Mapping[str, Any] | None) -> bool:
    """Whether verl's `algorithm` section takes a KL penalty off the rewards."""
    return bool(config is not None and config.get("use_kl_in_reward", False))


def _extras(
    estimator: Estimator,
    config: Mapping[str, Any] | None,
    labels: list[Hashable],
    live: torch.Tensor,
    mask: torch.Tensor,
) -> dict[str, Any]:
    """Take what the estimator needs from the channel, checked and on the rewards' device."""
    who = f"algorithm.adv_estimator = {estimator.name!r}"
    modes = " or ".join(trainer_modes(estimator, config))
    found = {}
    for name in needs(estimator, config):
        source = f"{name} from the trainer: trainer.v1.trainer_mode must be {modes}"
        found[name] = extras.require(name, who, source)
    if penalizes(config):
        source = f"the scores before the penalty: trainer.v1.trainer_mode must be {modes}"
        extras.require(extras.SCORES, f"{who} with algorithm.use_kl_in_reward = True", source)
    for name in found.keys() & TOKEN_VALUES.keys():
        values = found[name].detach()
        if values.shape != mask.shape:
            raise DataError(
                f"{name} {tuple(values.shape)} must have the shape of response_mask "
                f"{tuple(mask.shape)}"
            )
        require_finite(name, values, mask)
        found[name] = values.to(mask.device)
    for name in filter(is_reward, found):
        values = found[name].detach().to(mask.device, torch.float64)
        if values.shape != live.shape:
            raise DataError(f"{name} {tuple(values.shape)}: must be {tuple(live.shape)}")
        require_finite(name, values, live)
        found[name] = values.masked_fill(~live, 0.0)
    if extras.OPENING in found:
        found[extras.OPENING] = opening = found[extras.OPENING].to(mask.device)
        if opening.shape != live.shape:
            raise DataError(f"{extras.OPENING} {tuple(opening.shape)}: must be {tuple(live.shape)}")
    if extras.OUTPUT in found:
        found[extras.OUTPUT] = found[extras.OUTPUT].to(mask.device)
    if "values" in found:
        of_prompt: Mapping[Hashable, float] = found["values"]
        for row in live.nonzero().squeeze(-1).tolist():
            if labels[row] not in of_prompt:
                raise DataError(
                    f"{estimator.name}: uid {labels[row]!r} is of no prompt that was drawn"
                )
        values = [of_prompt.get(label, 0.0) for label in labels]
        found["values"] = torch.tensor(values, dtype=torch.float64, device=mask.device)
    return found


def _estimate(
    estimator: Estimator,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Mapping[str, Any] | None = None,
    index: Iterable[Hashable] | None = None,
    reward_baselines: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow verl's estimator interface: advantages twice, `[batch, response]` float32.

    `reward_baselines` is ReMax's; verl passes it whenever the batch holds it, and no estimator
    here has a use for it.

    Raises:
        ConfigError: A setting is unknown or out of range, or the trainer mode is not ours.
        DataError: uids are missing, or a tensor has the wrong shape or is not finite.
    """
    assert estimator.advantage is not None  # noqa: S101 - for the type checker
    settings, normalize_by_std = read_settings(estimator, config), normalizes_by_std(config)
    if index is None:
        raise DataError(f"{estimator.name}: uid is missing; every response needs its prompt's uid")
    codes, labels = group_codes(index, len(token_level_rewards))
    part = make_rollout(token_level_rewards, response_mask, codes, normalize_by_std)
    part = part._replace(extras=_extras(estimator, config, labels, part.live, part.mask))
    rollout = joined([*(extras.get(extras.EARLIER) or ()), part])
    result = estimator.advantage(rollout, settings)
    if (front := weight_in_front(estimator, config)) is not None:
        weight, settings = front
        result = weight.weigh(rollout, result, settings)
    advantages = result.values.float()
    if advantages.dim() == 1:
        advantages = rollout.to_outputs(advantages).unsqueeze(-1) * rollout.mask
    report: Callable[[Estimate], None] | None = extras.get(extras.REPORT)
    if report is not None:
        report(Estimate(part, labels, rollout, result, advantages))
    elif estimator.weights_by_sign and estimator.name not in _told:
        # verl's own trainer runs.
        _told.add(estimator.name)
        logger.warning(
            f"{estimator.name}: alpha = {result.alpha:.3f} in this batch; an estimator cannot add "
            "to verl's metrics: trainer.v1.trainer_mode=hpo_sync logs hpo/alpha on every step"
        )
    own = advantages[len(advantages) - len(labels) :, : part.mask.shape[1]]
    return own, own


ESTIMATORS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    name: functools.partial(_estimate, estimator) for name, estimator in OUR_ESTIMATORS.items()
}


def register(core_algos: Any) -> None:
    """Register the estimators with verl; a second call changes nothing."""
    for name, estimator in ESTIMATORS.items():
        core_algos.register_adv_est(name)(estimator)
