import math
import re

import pytest
import torch
from omegaconf import OmegaConf

from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.constrained_grpo import (
    ALGORITHMS,
    ConstrainedSettings,
    constrained_advantages,
)
from hpo_verl.errors import ConfigError

DUAL, VELOCITY = "constrained_dual/format", "constrained_velocity/format"
LOG3 = math.log(3)


def step(settings=None, memory=None, rewards=(1.0, 0.0), scores=None, live=None, **named):
    """One group; with two responses and no deviation below the line, A is +-1/2 of a difference."""
    count = len(rewards)
    live = torch.tensor([True] * count if live is None else live)
    named = {"format": [0.0, 1.0], **named}
    extras = {f"reward/{name}": torch.tensor(v, dtype=torch.float64) for name, v in named.items()}
    rollout = Rollout(
        torch.tensor(rewards), torch.zeros(count, dtype=torch.int64), live, live[:, None], False,
        {"memory": memory or {}, **extras}, None if scores is None else torch.tensor(scores),
    )  # fmt: skip
    return constrained_advantages(rollout, settings or ConstrainedSettings(thresholds=[0.9]))


def test_inequality_by_hand():
    # mu = sigmoid(log 3) = 3/4, mu' = 3/16; the mean is 1/2, and theta 0.9.
    result = step(memory={DUAL: LOG3, VELOCITY: 0.2})
    assert result.values.dtype == torch.float64
    # 1/4 of (1/2, -1/2) and 3/4 of (-1/2, 1/2).
    assert result.values.tolist() == pytest.approx([-0.25, 0.25], rel=1e-12)
    # v = 0.1 * 0.2 + 3/16 * (-0.4) = -0.055: below its threshold the weight rises.
    assert result.memory == pytest.approx({DUAL: LOG3 + 0.0055, VELOCITY: -0.055}, rel=1e-12)
    assert result.statistics == pytest.approx(
        {
            "constrained_multiplier/format": 0.75,
            "constrained_excess/format": -0.4,
            "constrained_objective_weight": 0.25,
        }
    )


def test_equality_by_hand():
    # mu = tanh(z) = -1/2, mu' = 3/4: a reward above its threshold is pulled down.
    settings = ConstrainedSettings(thresholds=[0.1], equality=True)
    result = step(settings, {DUAL: math.atanh(-0.5)})
    # 3/2 of (1/2, -1/2) and -1/2 of (-1/2, 1/2).
    assert result.values.tolist() == pytest.approx([1.0, -1.0], rel=1e-12)
    assert result.memory[VELOCITY] == pytest.approx(0.75 * 0.4)
    assert result.memory[DUAL] == pytest.approx(math.atanh(-0.5) - 0.03)


def test_at_the_start_a_constraint_weighs_half_or_nothing():
    assert step().statistics["constrained_multiplier/format"] == 0.5
    equal = step(ConstrainedSettings(thresholds=[0.9], equality=True))
    assert equal.values.tolist() == [0.5, -0.5]
    sure = step(ConstrainedSettings(thresholds=[0.9], initial=800.0))
    assert sure.statistics["constrained_multiplier/format"] == 1.0
    assert sure.values.tolist() == [-0.5, 0.5]


def test_two_constraints_by_hand():
    settings = ConstrainedSettings(rewards=["format", "brevity"], thresholds=[0.9, 0.25])
    result = step(settings, {DUAL: LOG3}, brevity=[0.75, 0.25])
    # N = 2: (2 - 3/4 - 1/2) (1/2) + 3/4 (-1/2) + 1/2 (1/4).
    assert result.values.tolist() == pytest.approx([0.125, -0.125], rel=1e-12)
    # mu' = 1/4 at 0, and the mean of brevity is 1/2: 1/4 above.
    assert result.memory["constrained_velocity/brevity"] == pytest.approx(1 / 16)
    assert result.memory["constrained_dual/brevity"] == pytest.approx(-1 / 160)
    assert result.memory[VELOCITY] == pytest.approx(3 / 16 * -0.4)


def test_each_reward_is_normalized_by_itself():
    live = torch.ones(4, dtype=torch.bool)
    rollout = Rollout(
        torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64), live, live[:, None], True,
        {"memory": {}, "reward/format": torch.tensor([0.0, 0, 0, 1e-3], dtype=torch.float64)},
    )  # fmt: skip
    # std 1/2 and 1/2000: GRPO's 3/2 and -1/2 of each, up to its epsilon; mu = 1/2.
    expected = [0.5, -0.5, -0.5, 0.5]
    values = constrained_advantages(rollout, ConstrainedSettings()).values.tolist()
    assert values == pytest.approx(expected, rel=5e-3)


def test_the_paper_s_objective_is_the_kl_penalty_alone():
    settings = ConstrainedSettings(thresholds=[0.9], objective="kl", equality=True)
    # The scores would say otherwise; the penalties are 0.5 and 0.25.
    result = step(settings, rewards=[0.5, -0.25], scores=[1.0, 0.0])
    assert result.values.tolist() == [-0.125, 0.125]
    assert step(settings).values.tolist() == [0.0, 0.0]
    reward = ConstrainedSettings(thresholds=[0.9], equality=True)
    assert step(reward, rewards=[0.5, -0.25], scores=[1.0, 0.0]).values.tolist() == [0.375, -0.375]


@pytest.mark.parametrize("equality", [False, True])
def test_dual_steps_are_those_of_torchs_sgd(equality):
    """SGD with momentum on mu(z) sg[mean - theta], as in the public code."""
    settings = ConstrainedSettings(thresholds=[0.6], equality=equality, momentum=0.5)
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer, memory = torch.optim.SGD([z], lr=0.1, momentum=0.5), {}
    for mean in (0.2, 0.9, 0.4, 0.5, 1.0):
        memory = step(settings, memory, format=[mean, mean]).memory
        optimizer.zero_grad()
        squashed = torch.tanh(z) if equality else torch.sigmoid(z)
        (squashed * (mean - 0.6)).sum().backward()
        optimizer.step()
        assert memory[DUAL] == pytest.approx(z.item(), rel=1e-12)


def test_rows_that_are_not_live_count_for_nothing():
    result = step(rewards=(1.0, 0.0, 1.0), format=[0.0, 1.0, 7.0], live=[True, True, False])
    assert result.values.tolist() == [0.0, 0.0, 0.0]
    assert result.statistics["constrained_excess/format"] == pytest.approx(-0.4)
    empty = step(memory={DUAL: 1.0}, live=[False, False])
    assert empty.memory == {}
    assert empty.values.tolist() == [0.0, 0.0]


def test_what_the_settings_read():
    settings = ConstrainedSettings(
        **OmegaConf.create({"rewards": ["a", "b"], "thresholds": [1, 0]})
    )
    assert settings.needs == ("reward/a", "reward/b")
    assert settings.thresholds == (1.0, 0.0)
    assert settings == ConstrainedSettings(rewards=("a", "b"), thresholds=(1.0, 0.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": []}, "rewards = []: must be a list of different names"),
        ({"rewards": "format"}, "rewards = 'format': must be a list of different names"),
        ({"thresholds": [0.5, 0.5]}, "thresholds = [0.5, 0.5]: must be a list of 1 numbers"),
        ({"thresholds": [math.nan]}, "thresholds[0] = nan: must be a number"),
        ({"equality": 1}, "equality = 1: must be true or false"),
        ({"objective": "score"}, "objective = 'score': must be one of reward, kl"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0: must be a number in [0, inf)"),
        ({"momentum": 1.5}, "momentum = 1.5: must be a number in [0, 1]"),
        ({"initial": math.inf}, "initial = inf: must be a number"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(given, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'algorithm.constrained.{message}')}"):
        ConstrainedSettings(**given)


def test_the_penalty_alone_needs_a_penalty():
    check = ALGORITHMS[0].estimator.check
    section = {"constrained": {"objective": "kl"}, "use_kl_in_reward": False}
    with pytest.raises(ConfigError, match=r"objective = 'kl': .*use_kl_in_reward must be true$"):
        check({"algorithm": section})
    check({"algorithm": section | {"use_kl_in_reward": True}})
    check({"algorithm": {"use_kl_in_reward": False}})
