"""Algorithms as the lab runs them: their recipes, read, checked and tried on a batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from hpo_verl.algorithms.base import REWARD
from hpo_verl.algorithms.registry import ALGORITHMS, ESTIMATORS
from hpo_verl.config.overrides import nearest
from hpo_verl.config.recipes import compose_recipe, recipes_directory
from hpo_verl.config.settings import ACTOR, leaves
from hpo_verl.errors import ConfigError
from hpo_verl.lab.objective import Objective
from hpo_verl.lab.tasks import Task
from hpo_verl.verl_plugin.advantages import reward_names, token_temperature

_READ = (
    "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo", "algorithm.filter_groups",
    "algorithm.gamma",
    "actor_rollout_ref.rollout.n",
    f"{ACTOR}.loss_agg_mode", f"{ACTOR}.loss_scale_factor", f"{ACTOR}.clip_ratio",
    f"{ACTOR}.tau_pos", f"{ACTOR}.tau_neg", f"{ACTOR}.policy_loss", f"{ACTOR}.entropy_coeff",
    f"{ACTOR}.use_kl_loss", f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type",
    # How verl splits the work; no number depends on it. The lab has sizes of its own.
    f"{ACTOR}.use_dynamic_bsz", f"{ACTOR}.ppo_mini_batch_size", "data.train_batch_size",
    # The lab samples as this loop does.
    "actor_rollout_ref.rollout.agent.default_agent_loop",
)  # fmt: skip
"""Beginnings of the names of settings that decide something here."""


def read_objective(
    task: Task, algorithm: str, changes: Mapping[str, Any] | None = None, longest: int | None = None
) -> Objective:
    """Put an algorithm upon a task's recipe, with changes by full key, and try it on a batch.

    Args:
        task: A task of the lab.
        algorithm: Name of its record.
        changes: Value by full key.
        longest: Tokens of a response at most; the task's bound if None.

    Raises:
        ConfigError: Unknown algorithm or setting, a bad value, a setting that the lab does not
            read, or an algorithm that the lab cannot run.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {algorithm!r}: {nearest(algorithm, ALGORITHMS)}")
    changed = tuple((changes or {}).items())
    return _composed(task.recipe, algorithm, longest or task.max_response_length, changed)


@functools.cache
def _composed(
    recipe: str, algorithm: str, max_response_length: int, changes: tuple[tuple[str, Any], ...]
) -> Objective:
    changed = [f"{key}={'null' if value is None else value}" for key, value in changes]
    length = f"data.max_response_length={max_response_length}"
    config = compose_recipe(recipe, [f"algo={algorithm}", length, *changed])
    own = OmegaConf.load(recipes_directory() / "algo" / f"{algorithm}.yaml")
    try:
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        objective = Objective(config.algorithm, actor)
        if objective.loss.head_fields is not None:
            raise ConfigError("its loss reads the head of the model, which the lab does not catch")
        if objective.estimator.updated is not None:
            raise ConfigError("compares gradients of single rewards, which the lab does not take")
        weights = [one.section for one in ESTIMATORS.values() if one.weight]
        sections = (objective.estimator.section, *weights)
        read = (*_READ, *(f"algorithm.{section}" for section in sections))
        for key in (*dict(changes), *dict(leaves(OmegaConf.to_container(own)))):
            if not key.lstrip("+").startswith(read):
                raise ConfigError(f"sets {key}, which the lab does not read yet")
        if token_temperature(objective.estimator, objective.section, {}) is not None:
            raise ConfigError("asks for a temperature per token, which the lab does not sample at")
        if (check := objective.estimator.check) is not None:
            check(config)
        _try(objective)
    except Exception as error:
        # Hydra puts its own words around an error of a typed config.
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"algorithm {algorithm!r}: {reason}") from error
    return objective


def _try(objective: Objective) -> None:
    """Let every setting meet the check of its reader."""
    mask = torch.ones((4, 2), dtype=torch.bool)
    groups = torch.arange(4) if objective.estimator.history else torch.tensor([0, 0, 1, 1])
    entropy = torch.linspace(0.5, 1.0, 8).view(4, 2)
    known = {"entropy": entropy, "progress": 0.5, "values": torch.full((4,), 0.5)}
    old = torch.full((4, 2), -1.0)
    known |= {"memory": {}, "old_log_prob": old}
    # Whether the task has them shows in the first step.
    names = reward_names(objective.estimator, objective.section)
    known |= {f"{REWARD}{name}": torch.tensor([1.0, 0.0, 0.0, 1.0]) for name in names}
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    advantages, _, given = objective.advantages(rewards, groups, mask, known)
    fields = objective.token_fields(entropy, mask, given)
    slopes, _ = objective.gradient(old - 0.01, old, advantages, mask, fields, (8, 4))
    if objective.has_entropy_term:
        slopes = slopes + objective.entropy_gradient(entropy, mask, fields, (8, 4))
    if objective.actor.use_kl_loss:
        slopes = slopes + objective.kl_gradient(old - 0.01, old, mask, fields, (8, 4))
    if not bool(torch.isfinite(slopes).all()):
        raise ConfigError("a setting makes the gradient infinite or undefined")
