"""Dynamic reward weighting by the gradients of the objectives (arXiv 2509.11452).

    A   = sum_k w_k A_k,   A_k GRPO's of reward k within its group
    s_k = sum_j <g_k, g_j>,   g_k the gradient of the loss with A_k for A, in layers 10 to 25
    w_k <- w_k exp(lr s_k / mu) / sum_j w_j exp(lr s_j / mu)

lr is the optimizer's learning rate. A reward whose gradient the others agree with gains weight.

Sources: the paper's equations; the public code (yining610/dynamic-reward-weighting) for layers,
mu = 1e-5, the first weights, 1/3 each, and KL and entropy terms of the loss within every g_k; it
takes each g_k over the whole batch of a step, and cuts its norm as the optimizer does. Decided
here: g_k is that of a mini-batch and is not cut, and the weights move once a training step, after
its update, by the mean of s over its mini-batches. So one place has them, the memory of the
estimator, which checkpoints keep, as logarithms; the mixed advantages are known on the driver, and
the loss is the usual one. A model of fewer layers is measured in those of 10 to 25 that it has, and
as a whole where it has none of them.

The price: one more pass forward and backward for each reward, and a copy of the gradient of those
layers for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import (
    require_integer,
    require_names,
    require_number,
    require_numbers,
)
from hpo_verl.errors import ConfigError

PATH = "algorithm.reward_gradients"
LOG_WEIGHT = "reward_log_weight/"


@dataclass(frozen=True)
class RewardGradientsSettings:
    """Settings of the reward weighting, under `algorithm.reward_gradients`.

    Attributes:
        rewards: Names under which the reward function returns the rewards.
        weights: The first w_k, as many, above 0; their sum is made 1.
        mu: Divides lr s_k, above 0; a smaller one moves the weights faster. The paper's, for a
            learning rate of 1e-6.
        first_layer: First layer whose gradients are compared, from 0.
        last_layer: Last one, not below.
    """

    rewards: tuple[str, ...] = ("acc", "format")
    weights: tuple[float, ...] = (0.5, 0.5)
    mu: float = 1e-5
    first_layer: int = 10
    last_layer: int = 25

    def __post_init__(self) -> None:
        names = require_names(f"{PATH}.rewards", self.rewards)
        numbers = require_numbers(f"{PATH}.weights", self.weights, len(names))
        if min(numbers) <= 0.0:
            raise ConfigError(f"{PATH}.weights = {self.weights!r}: must be above 0")
        # Lists of a configuration become tuples.
        object.__setattr__(self, "rewards", names)
        object.__setattr__(self, "weights", numbers)
        require_number(f"{PATH}.mu", self.mu, 0.0, open_low=True)
        require_integer(f"{PATH}.first_layer", self.first_layer, 0)
        require_integer(f"{PATH}.last_layer", self.last_layer, self.first_layer)

    @property
    def needs(self) -> tuple[str, ...]:
        """The rewards."""
        return tuple(f"{base.REWARD}{name}" for name in self.rewards)


def log_weights(memory: Mapping[str, Any], settings: RewardGradientsSettings) -> torch.Tensor:
    """Logarithms of the current weights, whose sum is 1, `[rewards]` float64."""
    pairs = zip(settings.rewards, settings.weights, strict=True)
    logs = [memory.get(f"{LOG_WEIGHT}{name}", math.log(weight)) for name, weight in pairs]
    return torch.tensor(logs, dtype=torch.float64).log_softmax(dim=0)


def updated(
    memory: Mapping[str, Any],
    comparison: base.GradientComparison,
    settings: RewardGradientsSettings,
) -> dict[str, Any]:
    """Weigh the rewards anew after an update."""
    scores = torch.tensor(
        [comparison.scores[name] for name in settings.rewards], dtype=torch.float64
    )
    moved = log_weights(memory, settings) + comparison.learning_rate * scores / settings.mu
    logs = moved.log_softmax(dim=0).tolist()
    return {f"{LOG_WEIGHT}{name}": log for name, log in zip(settings.rewards, logs, strict=True)}


def weighted_advantages(
    rollout: base.Rollout, settings: RewardGradientsSettings
) -> base.Advantages:
    """Mix GRPO's advantages of every reward.

    Returns:
        `[batch]` float64, and those of each reward for the comparison of gradients.
    """
    weights = log_weights(rollout.extras["memory"], settings).exp().tolist()
    total = torch.zeros_like(rollout.rewards, dtype=torch.float64)
    objectives, statistics = {}, {}
    for name, need, weight in zip(settings.rewards, settings.needs, weights, strict=True):
        objectives[name] = rollout.grouped_by(rollout.extras[need])
        total = total + weight * objectives[name]
        statistics[f"reward_weight/{name}"] = weight
    layers = (settings.first_layer, settings.last_layer)
    return base.Advantages(
        total, statistics=statistics, objectives=objectives, objective_layers=layers
    )


ALGORITHMS = (
    base.Algorithm(
        "reward_gradients",
        ("2509.11452",),
        f"{base.CLIP}, A = sum w_k A_k, w by inner products of the rewards' gradients",
        base.TOKEN_MEAN,
        base.Estimator(
            "reward_gradients",
            weighted_advantages,
            RewardGradientsSettings,
            section="reward_gradients",
            needs=("memory",),
            check=base.refuse_kl_in_reward,
            updated=updated,
        ),
    ),
)
