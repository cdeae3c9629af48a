import re

import pytest
import torch

from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.eapo import EAPOSettings, discounted_advantages
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.errors import ConfigError

# One prompt: a success in three rounds, a failure in two, a success in one; rows in no order.
FINAL = torch.tensor([2, 2, 2, 4, 4, 5])
OUTPUT = torch.tensor([1, 0, 2, 0, 1, 0])
REWARDS = torch.tensor([9.0, 9.0, 1.0, 9.0, 0.0, 1.0])
LIVE = torch.tensor([False, False, True, False, True, True])


def rollout(**changes):
    size = len(changes.get("rewards", REWARDS))
    given = {
        "rewards": REWARDS,
        "groups": torch.zeros(size, dtype=torch.int64),
        "live": LIVE,
        "mask": torch.ones(size, 2, dtype=torch.bool),
        "final": FINAL,
        "extras": {"output": changes.pop("output", OUTPUT)},
    }
    return Rollout(**{**given, **changes})


def advantages(discount, **changes):
    return discounted_advantages(rollout(**changes), EAPOSettings(discount))


def test_rewards_by_round_by_hand():
    # gamma 1/2: .5, .25, 1, 0, 0, 1; mean 2.75/6, sum of squares .25 + .0625 + 1 + 1 = 2.3125.
    result = advantages(0.5, normalize_by_std=False)
    mean = 2.75 / 6
    expected = [0.5 - mean, 0.25 - mean, 1 - mean, -mean, -mean, 1 - mean]
    assert result.values[:, 0].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(result.values[:, 0], result.values[:, 1])
    std = ((2.3125 - 6 * mean**2) / 5) ** 0.5
    scaled = advantages(0.5).values[:, 0].tolist()
    assert scaled == pytest.approx([one / (std + 1e-6) for one in expected], abs=1e-12)
    assert result.statistics == {"eapo_rounds": 2.0}


def test_the_shorter_of_two_successes_is_worth_more_and_equal_ones_nothing():
    both = {"rewards": torch.ones(3), "live": torch.tensor([False, True, True])}
    both |= {"final": torch.tensor([1, 1, 2]), "output": torch.tensor([0, 1, 0])}
    first, last, alone = advantages(0.9, **both).values[:, 0].tolist()
    assert first < 0 < last == alone
    assert (advantages(1.0, **both).values == 0).all()


def test_a_discount_of_one_compares_all_rounds_with_their_sessions_rewards():
    by_session = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    plain = group_relative_advantages(
        by_session, torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.bool)
    ).advantages
    assert torch.equal(advantages(1.0).values[:, 0], plain)


def test_one_output_a_session_is_grpo_whatever_the_discount():
    one = {"rewards": torch.tensor([1.0, 0.0, 0.0]), "live": torch.ones(3, dtype=torch.bool)}
    one |= {"output": torch.zeros(3, dtype=torch.int64)}
    for final in (None, torch.arange(3)):
        result = advantages(0.5, **one, final=final)
        grouped = rollout(**one, final=final).grouped().advantages
        assert torch.equal(result.values[:, 0], grouped)
        assert result.statistics == {"eapo_rounds": 1.0}


def test_sessions_that_do_not_count_have_no_part_in_it():
    dead = LIVE.clone()
    dead[5] = False
    result = advantages(0.5, live=dead, normalize_by_std=False).values[:, 0].tolist()
    mean = 1.75 / 5
    assert result == pytest.approx([0.5 - mean, 0.25 - mean, 1 - mean, -mean, -mean, 0.0])


def test_masked_tokens_and_an_empty_batch():
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[:, 1] = False
    assert (advantages(0.5, mask=mask).values[:, 1] == 0).all()
    none = torch.zeros(0, dtype=torch.int64)
    empty = {"rewards": torch.zeros(0), "live": none.bool(), "final": none, "output": none}
    assert advantages(0.5, **empty).values.shape == (0, 2)


def test_signs_and_spread_are_those_of_the_scores_before_a_penalty():
    # A penalty makes the two failures differ; their scores do not.
    two = {"live": torch.ones(2, dtype=torch.bool), "final": None}
    two |= {"output": torch.zeros(2, dtype=torch.int64), "rewards": torch.tensor([-0.1, -0.2])}
    assert (advantages(0.5, **two, scores=torch.zeros(2)).values == 0).all()
    assert (advantages(0.5, **two).values != 0).all()


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan"), "0.5", None, True])
def test_a_discount_out_of_range_is_refused(value):
    message = f"algorithm.eapo.discount = {value!r}: must be a number in (0, 1]"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        EAPOSettings(value)
