import itertools
import re

import pytest
import torch

from hpo_verl.algorithms import maxrl as module
from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.maxrl import MaxRLSettings
from hpo_verl.errors import ConfigError, DataError


def advantages_of(rewards, groups, settings=None, live=None):
    live = torch.tensor([True] * len(rewards) if live is None else live)
    rollout = Rollout(torch.tensor(rewards), torch.tensor(groups), live, live[:, None])
    settings = MaxRLSettings() if settings is None else settings
    return module.success_normalized_advantages(rollout, settings).values


# Rates of success 1/4, 1, 0 and, of a group of one, 1.
REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
GROUPS = [0, 0, 0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("failure", [0.0, -1.0])
def test_by_hand(failure):
    rewards = [reward or failure for reward in REWARDS]
    values = advantages_of(rewards, GROUPS)
    assert values.dtype == torch.float64
    # (1 - 1/4) / (1/4) = 3, (0 - 1/4) / (1/4) = -1.
    assert values.tolist() == [3.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_without_the_baseline_successes_alone_teach():
    values = advantages_of(REWARDS, GROUPS, MaxRLSettings(baseline=False))
    assert values.tolist() == [4.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]


def test_the_epsilon_of_the_authors_code():
    values = advantages_of(REWARDS, GROUPS, MaxRLSettings(epsilon=0.25))
    assert values.tolist() == [1.5, -0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("dead", [1.0, 0.5, float("nan")])
def test_rows_that_are_not_live_count_for_nothing(dead):
    values = advantages_of([1.0, 0.0, dead], [0, 0, 0], live=[True, True, False])
    assert values.tolist() == [1.0, -1.0, 0.0]


def test_a_reward_of_a_third_value_is_refused():
    with pytest.raises(DataError, match=r"^reward 0\.5 of response 1: rewards must be 1 and 0"):
        advantages_of([1.0, 0.5], [0, 0])


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_expectation_is_the_cut_gradient_of_the_log_likelihood(size, p):
    """For one parameter, the logit of p: the score of a success is 1 - p, of a failure -p.

    Expected over all groups, mean A_i S_i = p (1 - p) sum_{k < N} (1 - p)^(k - 1).
    """
    expected = 0.0
    for rewards in itertools.product([0.0, 1.0], repeat=size):
        scores = torch.tensor(rewards, dtype=torch.float64) - p
        chance = p ** sum(rewards) * (1 - p) ** (size - sum(rewards))
        expected += chance * (advantages_of(rewards, [0] * size) * scores).mean().item()
    cut = sum((1 - p) ** (k - 1) for k in range(1, size))
    assert expected == pytest.approx(p * (1 - p) * cut, rel=1e-12)


def test_defaults_are_the_papers():
    assert MaxRLSettings() == MaxRLSettings(baseline=True, epsilon=0.0)


@pytest.mark.parametrize("value", [-1e-6, float("nan"), "0", None, True])
def test_an_epsilon_out_of_range_is_refused_by_its_path(value):
    message = f"algorithm.maxrl.epsilon = {value!r}: must be a number in [0, inf)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        MaxRLSettings(epsilon=value)


def test_the_baseline_is_true_or_false():
    with pytest.raises(ConfigError, match=r"^algorithm\.maxrl\.baseline = 1: must be true or"):
        MaxRLSettings(baseline=1)
