"""Validates, on the driver, what is not the algorithm's: prompts, guards, and verl's own."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_verl.algorithms.registry import ESTIMATORS, OUR_ESTIMATORS
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.advantages import OUR_MODES
from hpo_verl.verl_plugin.branching import check_branching
from hpo_verl.verl_plugin.curriculum import SECTION as CURRICULUM
from hpo_verl.verl_plugin.curriculum import curriculum_settings
from hpo_verl.verl_plugin.hints import check_hints
from hpo_verl.verl_plugin.knapsack import check_knapsack


def check_sampling(config: DictConfig) -> None:
    """Refuse, by a ConfigError, settings of how prompts are drawn that are wrong or not heeded."""
    check_knapsack(config)
    check_hints(config)
    check_branching(config)
    curriculum = curriculum_settings(config)
    mode = str(config["trainer"]["v1"]["trainer_mode"])
    if curriculum.by is None:
        return
    who = f"{CURRICULUM}.by = {curriculum.by!r}"
    if mode not in OUR_MODES:
        raise ConfigError(
            f"trainer.v1.trainer_mode = {mode!r}: {who} needs {' or '.join(OUR_MODES)}"
        )
    name = str(config["algorithm"].get("adv_estimator"))
    estimator = ESTIMATORS.get(name)
    if estimator is not None and estimator.history is not None:
        raise ConfigError(f"{who}: must be null, since adv_estimator = {name!r} draws its prompts")


def check_guards(config: DictConfig) -> None:
    """Check the settings of the guards and of the rollout `hf`; a bad one raises a ConfigError."""
    from hpo_verl.verl_plugin.engine.step_guard import step_guard_settings
    from hpo_verl.verl_plugin.rollout.hf_settings import hf_settings
    from hpo_verl.verl_plugin.rollout.reward_guard import guard_settings
    from hpo_verl.verl_plugin.rollout.weight_update import weight_update_timeout

    guard_settings(config)
    step_guard_settings(config)
    weight_update_timeout(config["actor_rollout_ref"]["rollout"])
    hf_settings(config["actor_rollout_ref"]["rollout"])


def check_with_verl(config: DictConfig) -> None:
    """Let verl build its typed sections and validate the whole; its complaint is a ConfigError."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    # verl turns them into dataclasses, some of them only inside a worker.
    for section in ("algorithm", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"):
        values: Any = OmegaConf.to_container(OmegaConf.select(config, section), resolve=True)
        # verl passes these on to our estimators untyped.
        for estimator in OUR_ESTIMATORS.values():
            values.pop(estimator.section, None)
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
    if (mode := config.trainer.v1.trainer_mode) in ("separate_async", "hpo_separate_async"):
        _check_separate(config, f"trainer.v1.trainer_mode = {mode!r}")


def _check_separate(config: DictConfig, who: str) -> None:
    """What verl's trainer of that mode asserts of the configuration, once Ray runs."""
    rollout, path = config.actor_rollout_ref.rollout, "actor_rollout_ref.rollout"
    parts = config.trainer.v1.separate_async.parameter_sync_step
    batch = parts * config.actor_rollout_ref.actor.ppo_mini_batch_size
    if config.data.train_batch_size != batch:
        raise ConfigError(
            f"data.train_batch_size = {config.data.train_batch_size}: {who} updates it in "
            f"separate_async.parameter_sync_step = {parts} mini-batches; must be {batch}"
        )
    for key in ("nnodes", "n_gpus_per_node"):
        if rollout[key] < 1:
            raise ConfigError(
                f"{path}.{key} = {rollout[key]}: {who} samples on cards of its own; "
                "must be at least 1"
            )
    if rollout.checkpoint_engine.backend == "naive":
        raise ConfigError(
            f"{path}.checkpoint_engine.backend = 'naive': {who} sends weights to other cards; "
            "must be nccl, nixl or another"
        )


def _innermost(error: BaseException) -> str:
    """The message of the error behind Hydra's instantiation error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
