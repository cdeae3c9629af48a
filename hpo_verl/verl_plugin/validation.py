"""Checks of a whole configuration, on the driver, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_verl.algorithms.catalog import (
    AVERAGING_LOSSES,
    ESTIMATOR_SECTIONS,
    HOMOGENEOUS_LOSSES,
    HYSTERETIC_ESTIMATORS,
    PENALISED_LOSSES,
    SELECTING_LOSSES,
)
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.advantages import normalizes_by_std, read_settings
from hpo_verl.verl_plugin.d3s import d3s_settings
from hpo_verl.verl_plugin.engine.mini_batch import check_engine
from hpo_verl.verl_plugin.entropy import check_entropy
from hpo_verl.verl_plugin.estimator_inputs import BORROWING_ESTIMATORS, BORROWING_LOSSES
from hpo_verl.verl_plugin.losses import (
    ACTOR,
    CLIPPED_LOSSES,
    INFORMED_CONFIGS,
    LOSS_SETTINGS,
    clip_range,
    loss_settings,
    require_aggregation,
)
from hpo_verl.verl_plugin.spo import check_spo

# Sections that verl turns into dataclasses, some of them only inside a worker.
TYPED_SECTIONS = ("algorithm", "actor_rollout_ref.actor", "actor_rollout_ref.rollout")


def check_algorithm(config: Mapping[str, Any]) -> list[str]:
    """Check the settings of the algorithm and how they go together.

    Args:
        config: verl's whole configuration, resolved.

    Returns:
        Warnings: combinations that run but are not what their names promise.

    Raises:
        ConfigError: Unknown or out-of-range setting, or a combination that cannot be meant.
    """
    algorithm = config["algorithm"]
    actor = config["actor_rollout_ref"]["actor"]
    estimator = str(algorithm.get("adv_estimator"))
    loss_mode = str(actor["policy_loss"].get("loss_mode", "vanilla"))
    loss_agg_mode = str(actor.get("loss_agg_mode"))

    require_aggregation(loss_mode, loss_agg_mode)
    if loss_mode in CLIPPED_LOSSES:
        clip_range(actor)
    if loss_mode in LOSS_SETTINGS:
        loss_settings(LOSS_SETTINGS[loss_mode], actor["policy_loss"])
    target = actor["policy_loss"].get("_target_", None)
    if loss_mode in INFORMED_CONFIGS and target != INFORMED_CONFIGS[loss_mode]:
        raise ConfigError(
            f"{ACTOR}.policy_loss._target_ = {target!r}: policy_loss.loss_mode = {loss_mode!r} "
            f"needs {INFORMED_CONFIGS[loss_mode]}, as algo={loss_mode} sets it"
        )
    warnings = []
    if loss_mode == "sapo" and loss_agg_mode != "seq-mean-token-mean":
        warnings.append(
            f"policy_loss.loss_mode = 'sapo' ignores loss_agg_mode = {loss_agg_mode!r}: "
            "verl always uses seq-mean-token-mean there"
        )
    if estimator in HYSTERETIC_ESTIMATORS:
        read_settings(estimator, algorithm)
        warnings += _check_weighted(estimator, loss_mode, algorithm)
    if estimator == "d3s":
        warnings += _check_down_sampled(loss_mode, algorithm)
    if estimator == "spo":
        check_spo(config)
    _check_sections(estimator, algorithm)
    check_entropy(config)
    check_engine(config)
    return warnings


def _check_sections(estimator: str, algorithm: Mapping[str, Any]) -> None:
    """Refuse settings of an estimator that is not the selected one."""
    for section in dict.fromkeys(ESTIMATOR_SECTIONS.values()):
        if section != ESTIMATOR_SECTIONS.get(estimator) and algorithm.get(section, None):
            readers = [name for name, read in ESTIMATOR_SECTIONS.items() if read == section]
            raise ConfigError(
                f"algorithm.{section} = {dict(algorithm[section])!r}: algorithm.adv_estimator = "
                f"{estimator!r} ignores it; use {' or '.join(readers)}"
            )


def check_trainer_mode(config: Mapping[str, Any]) -> None:
    """Refuse a trainer mode that does not lend an algorithm what it needs.

    Args:
        config: verl's whole configuration, resolved.

    Raises:
        ConfigError: Names the mode, and the estimator or the loss.
    """
    estimator = str(config["algorithm"].get("adv_estimator"))
    loss_mode = str(config["actor_rollout_ref"]["actor"]["policy_loss"].get("loss_mode"))
    mode = str(config["trainer"]["v1"]["trainer_mode"])
    for key, name, borrowing in (
        ("algorithm.adv_estimator", estimator, BORROWING_ESTIMATORS),
        (f"{ACTOR}.policy_loss.loss_mode", loss_mode, BORROWING_LOSSES),
    ):
        modes = borrowing.get(name, (mode,))
        if mode not in modes:
            raise ConfigError(
                f"trainer.v1.trainer_mode = {mode!r}: {key} = {name!r} needs {' or '.join(modes)}"
            )


def _check_down_sampled(loss_mode: str, algorithm: Mapping[str, Any]) -> list[str]:
    """Check D3S's settings and that its loss lets dropped tokens be."""
    d3s_settings(algorithm)
    normalizes_by_std(algorithm)
    combination = f"adv_estimator = 'd3s' with policy_loss.loss_mode = {loss_mode!r}"
    reason = (SELECTING_LOSSES | PENALISED_LOSSES | AVERAGING_LOSSES).get(loss_mode)
    if reason is not None:
        usable = [name for name in HOMOGENEOUS_LOSSES if name not in AVERAGING_LOSSES]
        raise ConfigError(
            f"{combination}: tokens dropped by an advantage of 0 would still count, since that "
            f"loss {reason}; use one of {', '.join(usable)}"
        )
    if loss_mode not in HOMOGENEOUS_LOSSES:
        return [f"{combination}: unknown here; D3S needs a loss that is 0 where the advantage is"]
    return []


def _check_weighted(estimator: str, loss_mode: str, algorithm: Mapping[str, Any]) -> list[str]:
    """Check what the hysteretic weight is combined with."""
    combination = f"adv_estimator = {estimator!r} with policy_loss.loss_mode = {loss_mode!r}"
    if loss_mode in SELECTING_LOSSES:
        raise ConfigError(
            f"{combination}: the weight would change more than the weight of the loss, since "
            f"that loss {SELECTING_LOSSES[loss_mode]}; use one of {', '.join(HOMOGENEOUS_LOSSES)}"
        )
    warnings = []
    if loss_mode in PENALISED_LOSSES:
        warnings.append(f"{combination}: that loss {PENALISED_LOSSES[loss_mode]}")
    elif loss_mode not in HOMOGENEOUS_LOSSES:
        warnings.append(
            f"{combination}: unknown here; weighting the advantages equals weighting the loss "
            "only if that loss is proportional to the advantage"
        )
    if algorithm.get("use_kl_in_reward", False):
        warnings.append(
            f"adv_estimator = {estimator!r} with algorithm.use_kl_in_reward: the KL penalty "
            "enters the rewards, so groups are hardly ever equal and the counts of signs follow it"
        )
    return warnings


def check_guards(config: DictConfig) -> None:
    """Check the settings of the guards of rewards and updates.

    Raises:
        ConfigError: names the setting, its value and what is permitted.
    """
    from hpo_verl.verl_plugin.engine.step_guard import step_guard_settings
    from hpo_verl.verl_plugin.rollout.reward_guard import guard_settings
    from hpo_verl.verl_plugin.rollout.weight_update import weight_update_timeout

    guard_settings(config)
    step_guard_settings(config)
    weight_update_timeout(config["actor_rollout_ref"]["rollout"])


def check_with_verl(config: DictConfig) -> None:
    """Let verl build its typed sections and validate the whole.

    Raises:
        ConfigError: names the section and verl's complaint.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    for section in TYPED_SECTIONS:
        values: Any = OmegaConf.to_container(OmegaConf.select(config, section), resolve=True)
        # verl passes these on to our estimators untyped.
        for ours in ESTIMATOR_SECTIONS.values():
            values.pop(ours, None)
        try:
            omega_conf_to_dataclass(DictConfig(values))
        except Exception as error:
            raise ConfigError(f"{section}: {_innermost(error)}") from error
    try:
        validate_config(
            config=config,
            use_reference_policy=need_reference_policy(config),
            use_critic=need_critic(config),
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"verl refuses the configuration: {_innermost(error)}") from error


def _innermost(error: BaseException) -> str:
    """The message of the error behind Hydra's instantiation error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
