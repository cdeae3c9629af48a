import json
import math
import re

import pytest
import torch

from hpo_verl.algorithms.base import GradientComparison, Rollout
from hpo_verl.algorithms.reward_gradients import (
    RewardGradientsSettings,
    log_weights,
    updated,
    weighted_advantages,
)
from hpo_verl.errors import ConfigError

ACC, FORMAT = (1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0)


def step(settings=None, memory=None, by_std=False, acc=ACC, format_=FORMAT):
    live = torch.ones(4, dtype=torch.bool)
    rollout = Rollout(
        torch.tensor(acc), torch.zeros(4, dtype=torch.int64), live, live[:, None], by_std,
        {
            "memory": memory or {},
            "reward/acc": torch.tensor(acc, dtype=torch.float64),
            "reward/format": torch.tensor(format_, dtype=torch.float64),
        },
    )  # fmt: skip
    return rollout, weighted_advantages(rollout, settings or RewardGradientsSettings())


def test_advantages_by_hand():
    _, result = step(RewardGradientsSettings(weights=[3.0, 1.0]))
    assert result.values.dtype == torch.float64
    # 3/4 (3/4, -1/4, -1/4, -1/4) + 1/4 (1/2, 1/2, -1/2, -1/2)
    assert result.values.tolist() == pytest.approx([0.6875, -0.0625, -0.3125, -0.3125])
    assert result.objectives["acc"].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert result.objectives["format"].tolist() == [0.5, 0.5, -0.5, -0.5]
    assert result.objective_layers == (10, 25)
    expected = {"reward_weight/acc": 0.75, "reward_weight/format": 0.25}
    assert result.statistics == pytest.approx(expected)
    # Nothing is remembered before the update.
    assert result.memory == {}


def test_one_reward_is_grpo_with_it_and_equal_rewards_are_one():
    rollout, result = step(RewardGradientsSettings(["format"], [7.0]), by_std=True)
    expected = rollout.grouped_by(rollout.extras["reward/format"])
    assert torch.equal(result.values, expected)
    rollout, result = step(by_std=True, format_=ACC)
    torch.testing.assert_close(result.values, rollout.grouped().advantages, rtol=1e-14, atol=0)
    # Whatever their gradients, equal scores leave the weights.
    scores = GradientComparison({"acc": 0.3, "format": 0.3}, 1e-2)
    memory = updated({}, scores, RewardGradientsSettings())
    assert log_weights(memory, RewardGradientsSettings()).tolist() == pytest.approx(
        [math.log(0.5)] * 2, rel=1e-14
    )


def test_weights_by_hand_over_two_steps_and_a_checkpoint():
    settings = RewardGradientsSettings(weights=[3.0, 1.0], mu=1e-5)
    # lr s / mu = log 2 and -log 2: 3/4 * 2 to 1/4 / 2 is 12 to 1.
    scores = {"acc": 10 * math.log(2), "format": -10 * math.log(2)}
    memory = updated({}, GradientComparison(scores, 1e-6), settings)
    assert log_weights(memory, settings).exp().tolist() == pytest.approx([12 / 13, 1 / 13])
    # A checkpoint changes no bit.
    kept = json.loads(json.dumps(memory))
    assert kept == memory
    again = GradientComparison({"acc": 0.0, "format": 20 * math.log(2)}, 1e-6)
    memory = updated(kept, again, settings)
    assert log_weights(memory, settings).exp().tolist() == pytest.approx([12 / 16, 4 / 16])
    assert step(settings, memory)[1].statistics["reward_weight/acc"] == pytest.approx(0.75)


def test_a_weight_that_has_all_but_vanished_may_come_back():
    settings = RewardGradientsSettings()
    memory = updated({}, GradientComparison({"acc": 0.0, "format": -1.0}, 0.01), settings)
    assert log_weights(memory, settings).exp().tolist() == [1.0, 0.0]
    memory = updated(memory, GradientComparison({"acc": 0.0, "format": 1.0}, 0.01), settings)
    assert log_weights(memory, settings).exp().tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": ["acc", "acc"]}, "rewards = ['acc', 'acc']: must be a list of different"),
        ({"weights": [1.0]}, "weights = [1.0]: must be a list of 2 numbers"),
        ({"weights": [1.0, 0.0]}, "weights = [1.0, 0.0]: must be above 0"),
        ({"mu": 0.0}, "mu = 0.0: must be a number in (0, inf)"),
        ({"first_layer": -1}, "first_layer = -1: must be"),
        ({"last_layer": 9}, "last_layer = 9: must be"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(given, message):
    path = f"algorithm.reward_gradients.{message}"
    with pytest.raises(ConfigError, match=f"^{re.escape(path)}"):
        RewardGradientsSettings(**given)
