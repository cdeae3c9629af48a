"""Constrained RLHF (arXiv 2310.04373) without critics: a variant, on group-relative advantages.

    maximize the mean of R_0   subject to   mean of R_i >= theta_i,   or = theta_i (`equality`)
    A   = (N - sum_i mu_i) A_0 + sum_i mu_i A_i,   mu_i = sigmoid(z_i),   or tanh(z_i)
    v_i <- momentum v_i + mu'(z_i) (mean R_i - theta_i),   z_i <- z_i - lr v_i

A_0 and each A_i are GRPO's, every reward by itself within its group; N is the number of
constraints. The paper has PPO with a value head for each constraint, GAE, and whitens every
advantage over the mini-batch. Its R_0 is the KL penalty alone (`objective: kl`), so that rewards
are sought only up to their thresholds: mu-PPO with the sigmoid, xi-PPO with tanh, whose weight
may turn negative and pull a reward down. Here R_0 may also be the task's own reward.

Sources: the public code (tedmoskovitz/ConstrainedRL4LMs) for the mixture, both squashing
functions, and SGD on sum_i mu_i sg[mean R_i - theta_i] with momentum 0.1 and lr 0.1 (its script;
0.01 in the class). Decided here: z starts at 0 (there one draw of N(0, 0.01) for all
constraints); one dual step a training step, of the means over all of its responses, after the
advantages (there one for each mini-batch and epoch, 200 a rollout with its script, its gradient's
norm cut at 0.5); a threshold of the format alone, 0.95.

Left out: multipliers that are not squashed, whose code skips the first one; the search for
thresholds by Nelder-Mead during the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import (
    require_choice,
    require_flag,
    require_names,
    require_number,
    require_numbers,
)
from hpo_verl.errors import ConfigError

PATH = "algorithm.constrained"
OBJECTIVES = ("reward", "kl")


@dataclass(frozen=True)
class ConstrainedSettings:
    """Settings of the constraints, under `algorithm.constrained`.

    Attributes:
        rewards: Names under which the reward function returns the R_i.
        thresholds: The theta_i, as many.
        equality: Whether R_i is to be theta_i; otherwise at least theta_i.
        objective: What R_0 is: `reward`, the task's, or `kl`, verl's KL penalty alone.
        learning_rate: Of the dual steps, at least 0.
        momentum: Of the dual steps, in [0, 1].
        initial: z_i at the start.
    """

    rewards: tuple[str, ...] = ("format",)
    thresholds: tuple[float, ...] = (0.95,)
    equality: bool = False
    objective: str = "reward"
    learning_rate: float = 0.1
    momentum: float = 0.1
    initial: float = 0.0

    def __post_init__(self) -> None:
        names = require_names(f"{PATH}.rewards", self.rewards)
        numbers = require_numbers(f"{PATH}.thresholds", self.thresholds, len(names))
        # Lists of a configuration become tuples.
        object.__setattr__(self, "rewards", names)
        object.__setattr__(self, "thresholds", numbers)
        require_flag(f"{PATH}.equality", self.equality)
        require_choice(f"{PATH}.objective", self.objective, OBJECTIVES)
        require_number(f"{PATH}.learning_rate", self.learning_rate, 0.0)
        require_number(f"{PATH}.momentum", self.momentum, 0.0, 1.0)
        require_number(f"{PATH}.initial", self.initial, -math.inf)

    @property
    def needs(self) -> tuple[str, ...]:
        """The rewards."""
        return tuple(f"{base.REWARD}{name}" for name in self.rewards)

    def squashed(self, z: float) -> tuple[float, float]:
        """Multiplier of a constraint, and its slope."""
        tanh = math.tanh(z if self.equality else z / 2)
        slope = 1.0 - tanh * tanh
        return (tanh, slope) if self.equality else (0.5 + tanh / 2, slope / 4)


def constrained_advantages(rollout: base.Rollout, settings: ConstrainedSettings) -> base.Advantages:
    """Mix the advantages of objective and constraints, and take a dual step.

    Returns:
        `[batch]` float64; and z and v of each constraint, for the next step.
    """
    if settings.objective == "reward":
        objective = rollout.grouped().advantages
    else:
        scores = rollout.rewards if rollout.scores is None else rollout.scores
        objective = rollout.grouped_by(rollout.rewards - scores)
    live, memory, kept = rollout.live, rollout.extras["memory"], dict[str, float]()
    weight, constraints = float(len(settings.rewards)), torch.zeros_like(objective)
    statistics: dict[str, float] = {}
    for name, threshold in zip(settings.rewards, settings.thresholds, strict=True):
        rewards = rollout.extras[f"{base.REWARD}{name}"]
        key, velocity_key = f"constrained_dual/{name}", f"constrained_velocity/{name}"
        z, velocity = memory.get(key, settings.initial), memory.get(velocity_key, 0.0)
        multiplier, slope = settings.squashed(z)
        weight -= multiplier
        constraints = constraints + multiplier * rollout.grouped_by(rewards)
        statistics[f"constrained_multiplier/{name}"] = multiplier
        if not bool(live.any()):
            continue
        violation = float(rewards[live].mean()) - threshold
        statistics[f"constrained_excess/{name}"] = violation
        kept[velocity_key] = velocity = settings.momentum * velocity + slope * violation
        kept[key] = z - settings.learning_rate * velocity
    statistics["constrained_objective_weight"] = weight
    return base.Advantages(weight * objective + constraints, statistics=statistics, memory=kept)


def _check(config: Mapping[str, Any]) -> None:
    """Refuse the KL penalty as the objective where there is none."""
    algorithm = config["algorithm"]
    objective = (algorithm.get("constrained") or {}).get("objective")
    if objective == "kl" and not algorithm.get("use_kl_in_reward", False):
        raise ConfigError(
            f"{PATH}.objective = 'kl': needs the penalty; algorithm.use_kl_in_reward must be true"
        )


ALGORITHMS = (
    base.Algorithm(
        "constrained_grpo",
        ("2310.04373",),
        f"{base.CLIP}, A = (N - sum mu) A_0 + sum mu_i A_i, mu_i by dual steps",
        base.TOKEN_MEAN,
        base.Estimator(
            "constrained_grpo",
            constrained_advantages,
            ConstrainedSettings,
            section="constrained",
            needs=("memory",),
            check=_check,
        ),
    ),
)
