"""Dynamic reward weighting by hypervolume (arXiv 2509.11452).

    A_i = m GRPO(sum_k w_k r_ik),   m = 0.5 + 1.5 tanh(HV(front + p) - HV(front))

p is the mean of every reward over the last validation, and HV the volume that the front, the
points of the validations before, dominates above the reference point, that of the first one. A
policy that adds volume learns faster, at up to twice the rate, one that adds none at half of it.
Before the second validation m = 1.

The paper and its public code multiply the reward by m. GRPO divides by the deviation of the
group, which takes every factor out again, up to its epsilon: in the code's GRPO the weight acts
on nothing. Here m multiplies the advantage, which is the same without the division.

Sources: the public code (yining610/dynamic-reward-weighting) for m, front and reference point;
its script validates after every step (`trainer.test_freq=1`), has 1/3 for each w, PPO's clip out
of reach and a KL term of 0.001. The code's volume may turn negative, and then ends the run,
where a point lies below the reference in the last objective; here only points above it in every
objective add volume. Decided here: m stays until the next validation; w < 0 is for a reward that
is to be small, whose mean counts with its sign turned, as the code's `maximize: False`; the
rewards that every task here has, and PPO's clip at 0.2 without a KL term, as everywhere.

Left out: the paper's second way, weights from the gradient of each objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.pareto import dominated_volume
from hpo_verl.core.settings import require_names, require_number, require_numbers
from hpo_verl.errors import ConfigError

PATH = "algorithm.hypervolume"
REFERENCE, FRONT, FACTOR = "hypervolume_reference", "hypervolume_front", "hypervolume_factor"
SMALLEST_GAIN = 1e-12
"""A smaller gain of volume is rounding."""


@dataclass(frozen=True)
class HypervolumeSettings:
    """Settings of the reward weighting, under `algorithm.hypervolume`.

    Attributes:
        rewards: Names under which the reward function returns the r_k.
        weights: The w_k, as many; below 0 for a reward that is to be small, not 0.
        lowest: m where no volume is added, at least 0.
        span: How much larger m may become, at least 0.
    """

    rewards: tuple[str, ...] = ("acc", "format")
    weights: tuple[float, ...] = (0.5, 0.5)
    lowest: float = 0.5
    span: float = 1.5

    def __post_init__(self) -> None:
        names = require_names(f"{PATH}.rewards", self.rewards)
        numbers = require_numbers(f"{PATH}.weights", self.weights, len(names))
        if 0.0 in numbers:
            raise ConfigError(f"{PATH}.weights = {self.weights!r}: must be other than 0")
        # Lists of a configuration become tuples.
        object.__setattr__(self, "rewards", names)
        object.__setattr__(self, "weights", numbers)
        require_number(f"{PATH}.lowest", self.lowest, 0.0)
        require_number(f"{PATH}.span", self.span, 0.0)

    @property
    def needs(self) -> tuple[str, ...]:
        """The rewards."""
        return tuple(f"{base.REWARD}{name}" for name in self.rewards)


def validated(
    memory: Mapping[str, Any], means: Mapping[str, float], settings: HypervolumeSettings
) -> dict[str, Any]:
    """Compare a validation with those before it; reference point, front and m are remembered."""
    pairs = zip(settings.rewards, settings.weights, strict=True)
    point = tuple(math.copysign(1.0, weight) * means[name] for name, weight in pairs)
    if REFERENCE not in memory:
        return {REFERENCE: list(point), FRONT: [], FACTOR: 1.0}
    reference, front = tuple(memory[REFERENCE]), [tuple(one) for one in memory[FRONT]]
    gain = dominated_volume([*front, point], reference) - dominated_volume(front, reference)
    if gain > SMALLEST_GAIN:
        dominated = {
            one for one in front if all(x <= new for x, new in zip(one, point, strict=True))
        }
        # The points that the new one dominates add nothing any more.
        front = [*(one for one in front if one not in dominated), point]
    factor = settings.lowest + settings.span * math.tanh(max(gain, 0.0))
    return {FRONT: [list(one) for one in front], FACTOR: factor}


def weighted_advantages(rollout: base.Rollout, settings: HypervolumeSettings) -> base.Advantages:
    """GRPO's advantages of the weighted sum of the rewards, times the last validation's factor.

    Returns:
        `[batch]` float64.
    """
    memory = rollout.extras["memory"]
    total = torch.zeros_like(rollout.rewards, dtype=torch.float64)
    for name, weight in zip(settings.needs, settings.weights, strict=True):
        total = total + weight * rollout.extras[name]
    factor = memory.get(FACTOR, 1.0)
    front = [tuple(one) for one in memory.get(FRONT, ())]
    statistics = {
        FACTOR: factor,
        "hypervolume": dominated_volume(front, tuple(memory.get(REFERENCE, ()))) if front else 0.0,
    }
    return base.Advantages(factor * rollout.grouped_by(total), statistics=statistics)


ALGORITHMS = (
    base.Algorithm(
        "hypervolume",
        ("2509.11452",),
        f"{base.CLIP}, A of weighted rewards, times a factor by the hypervolume of validations",
        base.TOKEN_MEAN,
        base.Estimator(
            "hypervolume",
            weighted_advantages,
            HypervolumeSettings,
            section="hypervolume",
            needs=("memory",),
            check=base.refuse_kl_in_reward,
            validated=validated,
        ),
    ),
)
