import re

import pytest
import torch

from hpo_verl.algorithms import asym_re as module
from hpo_verl.algorithms.asym_re import AsymRESettings
from hpo_verl.algorithms.base import Rollout
from hpo_verl.errors import ConfigError, DataError


def advantages_of(rewards, groups, settings=None, live=None):
    live = torch.tensor([True] * len(rewards) if live is None else live)
    rollout = Rollout(torch.tensor(rewards), torch.tensor(groups), live, live[:, None])
    settings = AsymRESettings() if settings is None else settings
    return module.shifted_advantages(rollout, settings).values


# A mixed group, one of failures alone, one of one.
REWARDS, GROUPS = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0, 0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("failure", [0.0, -1.0])
def test_by_hand(failure):
    values = advantages_of([reward or failure for reward in REWARDS], GROUPS)
    assert values.dtype == torch.float64
    # Means -1/2, -1 and 1: 1 + 1/2 + 0.1, -1 + 1/2 + 0.1, 0.1.
    assert values.tolist() == [1.6, -0.4, -0.4, -0.4, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(("shift", "values"), [(0.0, [1.0, -1.0]), (0.25, [0.75, -1.25])])
def test_the_shift(shift, values):
    assert advantages_of([1.0, 0.0], [0, 0], AsymRESettings(shift)).tolist() == values


def test_rewards_as_they_are_given():
    settings = AsymRESettings(rewards="as_given")
    assert advantages_of(REWARDS, GROUPS, settings).tolist() == pytest.approx(
        [0.85, -0.15, -0.15, -0.15, 0.1, 0.1, 0.1], rel=1e-15
    )
    assert advantages_of([3.0, 0.5], [0, 0], settings).tolist() == [1.35, -1.15]


def test_other_rewards_are_refused():
    with pytest.raises(DataError, match=r"^reward 0\.5 of response 1: rewards must be 1 and 0"):
        advantages_of([1.0, 0.5], [0, 0])


@pytest.mark.parametrize("dead", [1.0, 0.5, float("nan")])
def test_rows_that_are_not_live_count_for_nothing(dead):
    values = advantages_of([1.0, 0.0, dead], [0, 0, 0], live=[True, True, False])
    assert values.tolist() == [1.1, -0.9, 0.0]


def test_defaults_are_the_papers():
    assert AsymRESettings() == AsymRESettings(baseline_shift=-0.1, rewards="sign")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "0", None, True])
def test_a_shift_out_of_range_is_refused_by_its_path(value):
    message = f"algorithm.asym_re.baseline_shift = {value!r}: must be a number in [-inf, inf)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        AsymRESettings(baseline_shift=value)


def test_rewards_is_one_of_two_words():
    message = r"^algorithm\.asym_re\.rewards = 'raw': must be one of sign, as_given$"
    with pytest.raises(ConfigError, match=message):
        AsymRESettings(rewards="raw")
