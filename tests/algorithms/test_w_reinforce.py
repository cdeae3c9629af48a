import re

import pytest
import torch

from hpo_verl.algorithms import w_reinforce as module
from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.w_reinforce import NSRSettings, PSRSettings, WReinforceSettings
from hpo_verl.errors import ConfigError, DataError

PATH = "algorithm.w_reinforce"


def advantages_of(rewards, settings, live=None):
    live = torch.tensor([True] * len(rewards) if live is None else live)
    # Groups mean nothing here: each response has one of its own.
    rollout = Rollout(torch.tensor(rewards), torch.arange(len(live)), live, live[:, None])
    return module.weighted_rewards(rollout, settings)


@pytest.mark.parametrize(
    ("settings", "values", "alpha"),
    [
        (PSRSettings(), [1.0, 0.0, 0.0], 0.0),
        (NSRSettings(), [0.0, -1.0, -1.0], 1.0),
        (WReinforceSettings(), [0.1, -1.0, -1.0], 1.0),
        (WReinforceSettings(1, 1), [1.0, -1.0, -1.0], 1.0),  # REINFORCE
        (WReinforceSettings(0.25, 0.5), [0.25, -0.5, -0.5], 0.5),
    ],
)
@pytest.mark.parametrize("failure", [0.0, -1.0])
def test_by_hand(settings, values, alpha, failure):
    result = advantages_of([1.0, failure, failure], settings)
    assert result.values.dtype == torch.float64
    assert result.values.tolist() == values
    assert result.unweighted.tolist() == [1.0, -1.0, -1.0]
    assert (result.positives, result.negatives, result.alpha) == (1, 2, alpha)


def test_no_baseline_so_equal_rewards_teach():
    assert advantages_of([0.0] * 4, NSRSettings()).values.tolist() == [-1.0] * 4
    assert advantages_of([1.0] * 4, PSRSettings()).values.tolist() == [1.0] * 4


@pytest.mark.parametrize("dead", [1.0, 0.5, float("nan")])
def test_rows_that_are_not_live_count_for_nothing(dead):
    result = advantages_of([1.0, 0.0, dead], WReinforceSettings(), live=[True, True, False])
    assert result.values.tolist() == [0.1, -1.0, 0.0]
    assert (result.positives, result.negatives) == (1, 1)


def test_a_reward_of_a_third_value_is_refused():
    with pytest.raises(DataError, match=r"^reward 0\.1 of response 1: rewards must be 1 and 0"):
        advantages_of([1.0, 0.1, 0.0], WReinforceSettings())


def test_defaults_are_the_papers():
    assert PSRSettings() == PSRSettings(positive_weight=1.0, negative_weight=0.0)
    assert NSRSettings() == NSRSettings(positive_weight=0.0, negative_weight=1.0)
    assert WReinforceSettings() == WReinforceSettings(positive_weight=0.1, negative_weight=1.0)


@pytest.mark.parametrize("kind", [PSRSettings, NSRSettings, WReinforceSettings])
@pytest.mark.parametrize("name", ["positive_weight", "negative_weight"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1", None, True])
def test_a_weight_out_of_range_is_refused_by_its_path(kind, name, value):
    message = f"{PATH}.{name} = {value!r}: must be a number in [0, inf)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        kind(**{name: value})


def test_two_weights_of_0_are_refused():
    with pytest.raises(ConfigError, match=rf"^{re.escape(PATH)}: both weights are 0"):
        PSRSettings(positive_weight=0.0)


def test_a_kl_penalty_in_the_rewards_is_refused():
    check = module.ALGORITHMS[0].estimator.check
    check({"algorithm": {"adv_estimator": "psr", "use_kl_in_reward": False}})
    check({"algorithm": {"adv_estimator": "psr"}})
    message = r"^algorithm\.use_kl_in_reward = True: adv_estimator = 'psr' takes the task's own"
    with pytest.raises(ConfigError, match=message):
        check({"algorithm": {"adv_estimator": "psr", "use_kl_in_reward": True}})
