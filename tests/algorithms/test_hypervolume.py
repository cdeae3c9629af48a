import itertools
import json
import math
import random
import re

import pytest
import torch

from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.hypervolume import (
    FACTOR,
    FRONT,
    REFERENCE,
    HypervolumeSettings,
    validated,
    weighted_advantages,
)
from hpo_verl.core.pareto import dominated_volume
from hpo_verl.errors import ConfigError

# ---------------------------------------------------------------- volumes


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        ([], (0.0, 0.0), 0.0),
        ([(3.0,), (2.0,)], (1.0,), 2.0),
        ([(1.0, 2.0), (2.0, 1.0)], (0.0, 0.0), 3.0),
        ([(1.0, 2.0), (1.0, 2.0), (1.0, 1.0)], (0.0, 0.0), 2.0),
        ([(1.0, 2.0), (2.0, 1.0)], (-1.0, 0.5), 2 * 1.5 + 1 * 0.5),
        # Not above the reference in every coordinate.
        ([(5.0, 0.0), (0.0, 5.0), (9.0, -1.0)], (0.0, 0.0), 0.0),
        ([(1.0, 1.0, -1.0), (1.0, 1.0, 2.0)], (0.0, 0.0, 0.0), 2.0),
        # Three of volume 2; any two, and all three, have a cube of 1 in common: 6 - 3 + 1.
        ([(1.0, 1.0, 2.0), (2.0, 1.0, 1.0), (1.0, 2.0, 1.0)], (0.0, 0.0, 0.0), 4.0),
    ],
)
def test_volumes_by_hand(points, reference, volume):
    for order in itertools.permutations(points):
        assert dominated_volume(order, reference) == pytest.approx(volume, rel=1e-12)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_volumes_count_the_cells_below_a_point(objectives):
    rng = random.Random(objectives)
    for _ in range(20):
        points = [tuple(rng.randint(-1, 4) for _ in range(objectives)) for _ in range(5)]
        cells = itertools.product(range(4), repeat=objectives)
        covered = sum(
            any(all(x > cell for x, cell in zip(one, each, strict=True)) for one in points)
            for each in cells
        )
        assert dominated_volume(points, (0,) * objectives) == covered


# ---------------------------------------------------------------- validations


def after(*validations, settings=None):
    """Factor after each validation by hand, and the memory at the end, as a checkpoint keeps it."""
    memory, factors = {}, []
    for acc, format_ in validations:
        means = {"acc": acc, "format": format_, "brevity": 0.3}
        memory |= validated(memory, means, settings or HypervolumeSettings())
        factors.append(memory[FACTOR])
        memory = json.loads(json.dumps(memory))
    return factors, memory


def test_factors_by_hand():
    # From (0.2, 0.5): 0.5 * 0.4 = 0.2; 0.6 * 0.1 - 0.5 * 0.1 = 0.01; nothing new; and
    # 0.6 * 0.4 - 0.21 = 0.03, which leaves nothing to the two before.
    factors, memory = after((0.2, 0.5), (0.7, 0.9), (0.8, 0.6), (0.8, 0.6), (0.8, 0.9))
    gains = (0.2, 0.01, 0.0, 0.03)
    assert factors == pytest.approx([1.0, *(0.5 + 1.5 * math.tanh(gain) for gain in gains)])
    assert factors[1] == pytest.approx(0.796063, rel=1e-6)
    assert memory == {REFERENCE: [0.2, 0.5], FRONT: [[0.8, 0.9]], FACTOR: factors[-1]}


def test_a_policy_below_the_start_in_one_objective_adds_nothing():
    factors, memory = after((0.2, 0.5), (0.9, 0.4), (0.9, 0.5))
    assert factors == [1.0, 0.5, 0.5]
    assert memory[FRONT] == []


def test_a_reward_of_negative_weight_is_to_be_small():
    settings = HypervolumeSettings(weights=[0.5, -2.0], lowest=0.0, span=1.0)
    factors, memory = after((0.25, 8.0), (0.75, 6.0), (0.75, 7.0), settings=settings)
    assert factors == pytest.approx([1.0, math.tanh(0.5 * 2.0), 0.0])
    assert memory[REFERENCE] == [0.25, -8.0]
    assert memory[FRONT] == [[0.75, -6.0]]


# ---------------------------------------------------------------- advantages


def step(settings=None, memory=None, by_std=False, acc=(1.0, 0.0), format_=(0.0, 1.0)):
    live = torch.tensor([True, True])
    rollout = Rollout(
        torch.zeros(2), torch.tensor([0, 0]), live, live[:, None], by_std,
        {
            "memory": memory or {},
            "reward/acc": torch.tensor(acc, dtype=torch.float64),
            "reward/format": torch.tensor(format_, dtype=torch.float64),
        },
    )  # fmt: skip
    return weighted_advantages(rollout, settings or HypervolumeSettings(weights=[0.75, 0.25]))


def test_advantages_by_hand():
    assert step().values.tolist() == [0.25, -0.25]
    memory = {REFERENCE: [0.0, 0.0], FRONT: [[0.5, 0.5]], FACTOR: 2.0}
    result = step(memory=memory)
    assert result.values.dtype == torch.float64
    assert result.values.tolist() == [0.5, -0.5]
    assert result.statistics == {"hypervolume_factor": 2.0, "hypervolume": 0.25}
    # Nothing new is to be remembered.
    assert result.memory == {}
    assert step().statistics == {"hypervolume_factor": 1.0, "hypervolume": 0.0}


def test_a_factor_on_the_rewards_would_cancel():
    """What the public code does: GRPO's division takes it out again, here it does not act on."""
    once = step(by_std=True).values
    twice = step(HypervolumeSettings(weights=[1.5, 0.5]), by_std=True).values
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=0)
    factor = step(memory={REFERENCE: [0, 0], FRONT: [], FACTOR: 2.0}, by_std=True).values
    torch.testing.assert_close(factor, 2 * once, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": ["acc", "acc"]}, "rewards = ['acc', 'acc']: must be a list of different"),
        ({"weights": [1.0]}, "weights = [1.0]: must be a list of 2 numbers"),
        ({"weights": [1.0, 0.0]}, "weights = [1.0, 0.0]: must be other than 0"),
        ({"lowest": -0.5}, "lowest = -0.5: must be a number in [0, inf)"),
        ({"span": math.inf}, "span = inf: must be a number in [0, inf)"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(given, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'algorithm.hypervolume.{message}')}"):
        HypervolumeSettings(**given)
