"""APO by hand: what a choice earns, what is forced, and the group that compares both."""

import re

import pytest
import torch

from hpo_verl.algorithms.apo import ALGORITHMS, APOSettings, adaptive_advantages, openings
from hpo_verl.algorithms.base import Opening, Rollout
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.errors import ConfigError

PATH = "algorithm.apo"

# A prompt of seven responses: two forced into each of two modes, three free.
SESSION = torch.arange(7)
MODES = torch.tensor([0, 0, 1, 1, 0, 1, -1])


def estimate(rewards, modes=MODES, session=SESSION, groups=None, live=None, **changes):
    rewards = torch.tensor(rewards)
    size = len(rewards)
    groups = torch.zeros(size, dtype=torch.int64) if groups is None else groups
    live = torch.ones(size, dtype=torch.bool) if live is None else live
    rollout = Rollout(
        rewards, groups, live, live.unsqueeze(-1).expand(size, 2), session=session,
        extras={"opening": modes},
    )  # fmt: skip
    return adaptive_advantages(rollout, APOSettings(**{"forced": 2, **changes}))


def grpo(rewards, groups=None, live=None):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    size = len(rewards)
    groups = torch.zeros(size, dtype=torch.int64) if groups is None else groups
    live = torch.ones(size, dtype=torch.bool) if live is None else live
    return group_relative_advantages(rewards, groups, live).advantages


def test_openings_are_the_modes_one_after_the_other():
    reasoning, instant = Opening("<reasoning>\n"), Opening("<instant>\n")
    assert openings(APOSettings()) == [reasoning] * 3 + [instant] * 3
    assert openings(APOSettings(["a", "b", "c"], 1)) == [Opening("a"), Opening("b"), Opening("c")]


def test_on_an_easy_prompt_a_dearer_choice_earns_less():
    # The cheap mode succeeds in 2 of 2: p = 1, so nothing is left of the dearer choice.
    result = estimate([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    expected = grpo([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(result.values, expected)
    assert result.statistics == {
        "apo_easy_fraction": 1.0,
        "apo_cheap_success": 1.0,
        "apo_cheap_fraction": pytest.approx(1 / 3),
        "apo_no_mode_fraction": pytest.approx(1 / 3),
        "apo_adaptive": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize(("alpha", "factor"), [(2.0, 0.75), (1.0, 0.5), (3.0, 0.875)])
def test_what_is_left_of_it_falls_with_the_success_of_the_cheap_mode(alpha, factor):
    # p = 1/2 is above a threshold of 0.4; the forced response in the dear mode keeps its reward.
    result = estimate([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0], alpha=alpha, threshold=0.4)
    torch.testing.assert_close(result.values, grpo([1.0, 0.0, 1.0, 0.0, factor, 1.0, 0.0]))
    assert result.statistics["apo_adaptive"] == pytest.approx((factor + 1) / 3)


def test_a_success_at_the_threshold_is_not_easy():
    rewards = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    result = estimate(rewards, threshold=0.5)
    torch.testing.assert_close(result.values, grpo(rewards))
    assert result.statistics["apo_easy_fraction"] == 0.0


def test_a_free_response_without_a_mode_earns_nothing():
    result = estimate([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert (result.values == 0).all()


def test_success_is_a_reward_from_the_limit_on():
    # Rewards of 0.6 are no success, unless the limit says so: then p = 1.
    rewards = [0.6, 0.0, 0.6, 0.6, 0.6, 0.6, 0.0]
    torch.testing.assert_close(estimate(rewards).values, grpo(rewards))
    rewards[4] = 0.0
    easy = estimate([0.6, 0.0, 0.6, 0.6, 0.6, 0.6, 0.0], success_reward=0.5)
    torch.testing.assert_close(easy.values, grpo(rewards))


def test_each_prompt_has_its_own_success_and_dead_rows_count_for_nothing():
    groups = torch.tensor([0] * 7 + [1] * 7)
    live = torch.ones(14, dtype=torch.bool)
    # The second prompt's only success in the cheap mode is dead, so p = 0.
    live[9] = False
    rewards = [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    result = estimate(rewards, MODES.repeat(2), SESSION.repeat(2), groups, live)
    rewards[4] = 0.0
    torch.testing.assert_close(result.values, grpo(rewards, groups, live))
    assert result.statistics["apo_easy_fraction"] == 0.5
    assert result.statistics["apo_cheap_success"] == pytest.approx(2 / 3)


def test_where_sessions_are_not_known_all_are_free():
    result = estimate([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0], session=None)
    torch.testing.assert_close(result.values, grpo([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]))
    assert result.statistics["apo_cheap_success"] == 0.0


# ---------------------------------------------------------------- settings


def test_defaults_are_the_papers_where_it_says_so():
    assert APOSettings() == APOSettings(("<reasoning>\n", "<instant>\n"), 3, 2.0, 0.5, 1.0)
    assert APOSettings(modes=["a", "b"]).modes == ("a", "b")


@pytest.mark.parametrize(
    ("name", "value", "permitted"),
    [
        ("modes", "ab", "must be a list of different names, one at least"),
        ("modes", ["a", "a"], "must be a list of different names"),
        ("modes", ["a"], "must be two prefixes or more, none the beginning of another"),
        ("modes", ["a", "ab"], "must be two prefixes or more, none the beginning of another"),
        ("forced", 0, "must be an integer of at least 1"),
        ("forced", 1.5, "must be an integer of at least 1"),
        ("alpha", 0.0, "must be a number in (0, inf)"),
        ("threshold", 1.5, "must be a number in [0, 1]"),
        ("success_reward", None, "must be a number in [-inf, inf), got NoneType"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(name, value, permitted):
    message = f"{PATH}.{name} = {value!r}: {permitted}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        APOSettings(**{name: value})


def config(n, **section):
    return {
        "algorithm": {"adv_estimator": "apo", "apo": section},
        "actor_rollout_ref": {"rollout": {"n": n}},
    }


def test_one_response_must_be_free():
    check = ALGORITHMS[0].estimator.check
    for fitting in (config(7), config(3, forced=1), config(1)):
        check(fitting)
    message = f"actor_rollout_ref.rollout.n = 6: {PATH}.forced times 2 modes are 6, and one"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}.*must be at least 7$"):
        check(config(6))
    with pytest.raises(ConfigError, match=r"n = 8: .* times 3 modes are 9"):
        check(config(8, modes=["a", "b", "c"]))
    penalized = config(8)
    penalized["algorithm"]["use_kl_in_reward"] = True
    with pytest.raises(ConfigError, match="use_kl_in_reward"):
        check(penalized)
