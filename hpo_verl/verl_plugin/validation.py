"""What is checked of estimator and loss, and of what they need, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from hpo_verl.algorithms.base import Estimator, Loss
from hpo_verl.algorithms.registry import ESTIMATORS, LOSSES, OUR_ESTIMATORS
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.advantages import (
    OUR_MODES,
    needs,
    normalizes_by_std,
    read_settings,
    token_temperature,
    trainer_modes,
    weight_in_front,
)
from hpo_verl.verl_plugin.losses import (
    ACTOR,
    ENGINE_VENDOR,
    STRATEGIES,
    VENDOR,
    clip_range,
    dual_clip,
    loss_settings,
    require_aggregation,
    selected_loss,
)


def check_algorithm(config: DictConfig) -> list[str]:
    """Check the algorithm's settings in verl's whole configuration, and how they go together.

    Returns:
        Warnings: combinations that run but are not what their names promise.

    Raises:
        ConfigError: Unknown or out-of-range setting, or a combination that cannot be meant.
    """
    algorithm = config["algorithm"]
    actor = config["actor_rollout_ref"]["actor"]
    estimator = OUR_ESTIMATORS.get(str(algorithm.get("adv_estimator")))
    loss, warnings = selected_loss(actor["policy_loss"]), []
    if loss is not None:
        warnings += _check_loss(loss, actor)
    warnings += _check_token_fields(estimator, loss, config)
    if estimator is not None:
        read_settings(estimator, algorithm)
        normalizes_by_std(algorithm)
        warnings += _check_composition(estimator, loss, config)
        by_token = token_temperature(estimator, algorithm, {}) is not None
        if by_token:
            _check_token_temperature(estimator, config)
        if by_token or estimator.temperatures is not None or estimator.openings is not None:
            _check_samples(estimator, config)
        if estimator.check is not None:
            estimator.check(config)
    _check_sections(str(algorithm.get("adv_estimator")), algorithm)
    _check_entropy(estimator, loss, algorithm)
    if loss is not None and (loss.mini_batch_sums is not None or loss.head_fields is not None):
        _check_engine(f"policy_loss.loss_mode = {loss.name!r}", STRATEGIES, config)
    if estimator is not None and estimator.updated is not None:
        # fsdp keeps a layer's gradients in one tensor.
        _check_engine(f"adv_estimator = {estimator.name!r}", ("fsdp2",), config)
    if loss is not None and loss.head_fields is not None:
        _check_head(loss, config)
    return warnings


def _check_loss(loss: Loss, actor: Any) -> list[str]:
    loss_agg_mode = str(actor.get("loss_agg_mode"))
    require_aggregation(loss, loss_agg_mode)
    if loss.clips:
        clip_range(actor)
    if loss.dual_clips:
        dual_clip(actor)
    loss_settings(loss, actor["policy_loss"])
    who = f"policy_loss.loss_mode = {loss.name!r}"
    if loss.kl_weight and not actor.get("use_kl_loss", False):
        raise ConfigError(f"{ACTOR}.use_kl_loss = false: {who} weighs that term; must be true")
    for name, read in (("entropy_coeff", loss.entropy_penalty), ("kl_loss_coef", loss.kl_weight)):
        value = actor.get(name, None)
        if read and (isinstance(value, (bool, str)) or not (value or 0) > 0):
            raise ConfigError(
                f"{ACTOR}.{name} = {value!r}: {who} is weighed by it; must be a number above 0"
            )
    if loss.always and loss_agg_mode != loss.always:
        return [
            f"policy_loss.loss_mode = {loss.name!r} ignores loss_agg_mode = {loss_agg_mode!r}: "
            f"verl always uses {loss.always} there"
        ]
    return []


def _check_token_fields(
    estimator: Estimator | None, loss: Loss | None, config: DictConfig
) -> list[str]:
    """Check that the loss gets the fields which it reads, and that somebody reads what is given."""
    read = {} if loss is None else loss.token_fields
    given = () if estimator is None else estimator.gives
    name = config["algorithm"].get("adv_estimator")
    loss_mode = config["actor_rollout_ref"]["actor"]["policy_loss"].get("loss_mode", None)
    combination = f"adv_estimator = {name!r} with policy_loss.loss_mode = {loss_mode!r}"
    lacking = [field for field, make in read.items() if make is None and field not in given]
    if lacking:
        makers = [one.name for one in OUR_ESTIMATORS.values() if {*lacking} <= {*one.gives}]
        raise ConfigError(
            f"{combination}: that loss reads {' and '.join(lacking)} of every token; use "
            f"{' or '.join(makers)}"
        )
    if unread := [field for field in given if field not in read]:
        return [f"{combination}: that loss does not read {' and '.join(unread)}"]
    return []


def _check_composition(estimator: Estimator, loss: Loss | None, config: DictConfig) -> list[str]:
    """Check what advantages that are weighted by sign, or set to 0 token by token, go into."""
    loss_mode = config["actor_rollout_ref"]["actor"]["policy_loss"].get("loss_mode", None)
    combination = f"adv_estimator = {estimator.name!r} with policy_loss.loss_mode = {loss_mode!r}"
    proportional = [name for name, one in LOSSES.items() if one.proportional]
    caveat = loss.caveat if loss is not None else ""
    if loss is not None and not loss.proportional and not caveat:
        caveat = "is not proportional to the advantage"
    weighs = estimator.weights_by_sign or weight_in_front(estimator, config["algorithm"])
    warnings = []
    if loss is None and (estimator.drops_tokens or weighs):
        warnings.append(
            f"{combination}: unknown here; that estimator needs a loss that is proportional to the "
            "advantage"
        )
    if estimator.drops_tokens and caveat:
        usable = [name for name in proportional if not LOSSES[name].caveat]
        raise ConfigError(
            f"{combination}: tokens dropped by an advantage of 0 would still count, since that "
            f"loss {caveat}; use one of {', '.join(usable)}"
        )
    if not weighs:
        return warnings
    if loss is not None and loss.selects:
        raise ConfigError(
            f"{combination}: the weight would change more than the weight of the loss, since "
            f"that loss {caveat}; use one of {', '.join(proportional)}"
        )
    if loss is not None and not loss.proportional:
        warnings.append(f"{combination}: that loss {caveat}")
    return warnings


def _check_sections(estimator: str, algorithm: Mapping[str, Any]) -> None:
    """Refuse settings of an estimator that is not the selected one."""
    sections = {name: one.section for name, one in OUR_ESTIMATORS.items() if one.section}
    for section in dict.fromkeys(sections.values()):
        if section != sections.get(estimator) and algorithm.get(section, None):
            readers = [name for name, read in sections.items() if read == section]
            selected = OUR_ESTIMATORS.get(estimator, Estimator(estimator))
            lends_weight = any(OUR_ESTIMATORS[name].weight for name in readers)
            if lends_weight and weight_in_front(selected, algorithm) is not None:
                continue
            by_itself = lends_weight and selected.weights_by_sign
            reason = "weights by sign itself" if by_itself else "ignores it"
            raise ConfigError(
                f"algorithm.{section} = {dict(algorithm[section])!r}: algorithm.adv_estimator = "
                f"{estimator!r} {reason}; use {' or '.join(readers)}"
            )


def _check_entropy(
    estimator: Estimator | None, loss: Loss | None, algorithm: Mapping[str, Any]
) -> None:
    """Refuse to skip verl's pass that computes the entropies which the algorithm needs."""
    needed = (estimator and "entropy" in needs(estimator, algorithm)) or (
        loss and loss.token_fields
    )
    correction = algorithm.get("rollout_correction", None)
    if needed and correction and correction.get("bypass_mode", False):
        raise ConfigError(
            "algorithm.rollout_correction.bypass_mode = True: skips the pass that computes the "
            "entropies which the algorithm needs; must be false"
        )


def _check_samples(estimator: Estimator, config: DictConfig) -> None:
    """Refuse what would not sample at the estimator's temperatures or openings, or undo them."""
    from hpo_verl.verl_plugin.rollout.agent_loop import NAME

    way = "samples at several temperatures"
    if estimator.openings is not None:
        way = "gives responses their beginning"
    who = f"adv_estimator = {estimator.name!r} {way}"
    rollout = config["actor_rollout_ref"]["rollout"]
    if (loop := rollout["agent"].get("default_agent_loop")) != NAME:
        raise ConfigError(
            f"actor_rollout_ref.rollout.agent.default_agent_loop = {loop!r}: {who}; must be {NAME}"
        )
    correction = config["algorithm"].get("rollout_correction", None) or {}
    for name in ("rollout_is", "rollout_rs"):
        if correction.get(name):
            raise ConfigError(
                f"algorithm.rollout_correction.{name} = {correction[name]!r}: {who}, which it "
                "would correct; must be null"
            )
    if estimator.openings is None:
        return
    # Responses dealt by value may all have openings; where one is given, a group seldom fails
    # whole; what no server sampled was routed nowhere.
    custom = rollout.get("custom") or {}
    for key, given in (
        ("enable_rollout_routing_replay", rollout.get("enable_rollout_routing_replay")),
        *(
            (f"custom.{name}.enable", (custom.get(name) or {}).get("enable"))
            for name in ("knapsack", "hints")
        ),
    ):
        if given:
            raise ConfigError(f"actor_rollout_ref.rollout.{key} = True: {who}; must be false")


def _check_token_temperature(estimator: Estimator, config: DictConfig) -> None:
    """Refuse a rollout that takes one temperature for all tokens of a response."""
    if (name := config["actor_rollout_ref"]["rollout"]["name"]) != "hf":
        raise ConfigError(
            f"actor_rollout_ref.rollout.name = {name!r}: algorithm.{estimator.section} asks for a "
            "temperature per token, which vLLM has not; must be hf"
        )


def _check_engine(who: str, permitted: Sequence[str], config: DictConfig) -> None:
    """Refuse a setting that needs an engine of ours where verl would select another."""
    strategy = config["actor_rollout_ref"]["actor"].get("strategy", None)
    if strategy not in permitted:
        raise ConfigError(
            f"{ACTOR}.strategy = {strategy!r}: {who} permits {' and '.join(permitted)} only"
        )
    section = ("ray_kwargs", "ray_init", "runtime_env", "env_vars")
    variables: Any = config
    for name in section:
        variables = variables.get(name) or {}
    key, vendor = ".".join((*section, ENGINE_VENDOR)), variables.get(ENGINE_VENDOR)
    vendor = vendor or os.environ.get(ENGINE_VENDOR)
    if vendor != VENDOR:
        raise ConfigError(
            f"{key} = {vendor!r}: {who} needs {VENDOR!r}, as recipes/run/default.yaml sets it"
        )


def _check_head(loss: Loss, config: DictConfig) -> None:
    """Refuse what hides the head of the model, or Adam's averages for it, from the engine."""
    for key, default, permitted in (
        ("actor.strategy", None, ("fsdp2",)),
        ("actor.optim.optimizer", "AdamW", ("AdamW", "Adam")),
        ("actor.optim.optimizer_impl", "torch.optim", ("torch.optim",)),
        ("actor.fsdp_config.offload_policy", False, (False,)),
        ("actor.ulysses_sequence_parallel_size", 1, (1,)),
        ("actor.fsdp_config.ulysses_sequence_parallel_size", 1, (1,)),
        ("model.use_fused_kernels", False, (False,)),
        ("model.lora_rank", 0, (0,)),
    ):
        value: Any = config["actor_rollout_ref"]
        *sections, name = key.split(".")
        for section in sections:
            value = value.get(section) or {}
        value = value.get(name, default)
        if value not in permitted:
            raise ConfigError(
                f"actor_rollout_ref.{key} = {value!r}: policy_loss.loss_mode = {loss.name!r} reads "
                "logits, and Adam's averages for the model's head; must be "
                + " or ".join(map(str, permitted))
            )


def check_trainer_mode(config: DictConfig) -> None:
    """Refuse, by a ConfigError, a trainer that lacks what the estimator or loss needs."""
    estimator = ESTIMATORS.get(str(config["algorithm"].get("adv_estimator")))
    loss = selected_loss(config["actor_rollout_ref"]["actor"]["policy_loss"])
    mode = str(config["trainer"]["v1"]["trainer_mode"])
    for key, record, modes in (
        (
            "algorithm.adv_estimator",
            estimator,
            trainer_modes(estimator, config["algorithm"]) if estimator else (),
        ),
        (f"{ACTOR}.policy_loss.loss_mode", loss, OUR_MODES if loss and loss.fields else ()),
    ):
        if record is not None and modes and mode not in modes:
            raise ConfigError(
                f"trainer.v1.trainer_mode = {mode!r}: {key} = {record.name!r} needs "
                f"{' or '.join(modes)}"
            )
    every = config["trainer"].get("test_freq")
    if estimator is not None and estimator.validated is not None and not (every or 0) > 0:
        raise ConfigError(
            f"trainer.test_freq = {every!r}: adv_estimator = {estimator.name!r} follows the "
            "validations of the run; must be above 0"
        )
