import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_verl.core.groups import STD_EPSILON, group_relative_advantages

ALL = torch.ones(64, dtype=torch.bool)


def advantages_of(rewards, codes, live=None, **options):
    rewards = torch.tensor(rewards)
    live = ALL[: len(rewards)] if live is None else torch.tensor(live, dtype=torch.bool)
    return group_relative_advantages(rewards, torch.tensor(codes).long(), live, **options)


def oracle(rewards, codes, live, normalize_by_std=True):
    """GRPO's advantage in NumPy float64, group by group, from the equation."""
    rewards = np.asarray(rewards, np.float64)
    out = np.zeros(len(rewards))
    for code in set(codes):
        rows = [i for i, c in enumerate(codes) if c == code and live[i]]
        values = rewards[rows]
        if len(rows) < 2 or np.ptp(values) == 0:
            continue
        out[rows] = values - values.mean()
        if normalize_by_std:
            out[rows] /= values.std(ddof=1) + 1e-6
    return out


def test_hand_derived_numbers():
    # Rewards 1 0 0 0: mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4, std 1/2.
    result = advantages_of([1.0, 0.0, 0.0, 0.0, 3.0, 1.0], [0, 0, 0, 0, 1, 1])
    half, root2 = 0.5 + 1e-6, 2**0.5 + 1e-6
    expected = [0.75 / half, -0.25 / half, -0.25 / half, -0.25 / half, 1 / root2, -1 / root2]
    assert result.advantages.dtype == torch.float64
    np.testing.assert_allclose(result.advantages, expected, rtol=1e-12)
    assert (result.groups, result.zero_spread_groups) == (2, 0)
    assert not result.zero_spread.any()


def test_without_normalisation_it_is_the_difference_from_the_mean():
    result = advantages_of([1.0, 0.0, 0.0, 0.0], [0] * 4, normalize_by_std=False)
    assert result.advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_the_epsilon_is_verls():
    assert STD_EPSILON == 1e-6


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, -0.3, 1e-3, 1e6, -1e6])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 64])
def test_equal_rewards_give_exactly_zero(reward, size):
    result = advantages_of([reward] * size, [0] * size)
    assert result.advantages.tolist() == [0.0] * size
    assert result.zero_spread.tolist() == [True] * size
    assert (result.groups, result.zero_spread_groups) == (1, 1)


def test_rewards_that_differ_by_rounding_only_are_equal():
    # A format reward and a correctness reward, summed over the response.
    summed = np.float32(0.1) + np.float32(0.6)
    assert summed != np.float32(0.7)
    result = advantages_of([float(summed), float(np.float32(0.7))], [0, 0])
    assert result.advantages.tolist() == [0.0, 0.0]


def test_a_reward_at_the_mean_has_no_sign():
    # In float32 the mean of 0, 0.7, 1.4 is not 0.7.
    result = advantages_of([0.0, 0.7, 1.4], [0, 0, 0])
    assert result.advantages[1].item() == 0.0
    assert result.zero_spread.tolist() == [False] * 3
    assert result.zero_spread_groups == 0


@pytest.mark.parametrize(
    ("values", "dtype", "equal"),
    [
        ([1.0, 1.0 + 1e-4], torch.float32, False),
        # The next float32 after 1 is 1 + 1.2e-7: one rounding apart; alone the difference counts.
        ([1.0, 1.0 + 1.2e-7], torch.float32, True),
        ([0.0, 1.2e-7], torch.float32, False),
        # Between 2^26 and 2^27 float32 counts by eights.
        ([1e8, 1e8 + 64.0], torch.float32, False),
        ([1e8, 1e8 + 8.0], torch.float32, True),
        ([1.0, 1.0 + 1.2e-7], torch.float64, False),
        ([0.1 + 0.2, 0.3], torch.float64, True),
        ([1, 2], torch.int64, False),
    ],
)
def test_equal_means_equal_to_one_rounding_of_the_rewards_own_type(values, dtype, equal):
    rewards = torch.tensor([*values, values[0], values[0]], dtype=dtype)
    result = group_relative_advantages(rewards, torch.zeros(4, dtype=torch.int64), ALL[:4])
    assert result.zero_spread.tolist() == [equal] * 4
    assert bool((result.advantages == 0).all()) == equal


def test_signs_and_spread_are_those_of_the_scores():
    """A penalty that differs by noise makes neither a sign nor a spread."""
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    noise = torch.tensor([0.3, 0.0, -0.1, 0.1, 0.2, 0.4])
    codes = torch.tensor([0, 0, 0, 0, 1, 1])
    result = group_relative_advantages(
        scores - noise, codes, ALL[:6], scores=scores, normalize_by_std=False
    )
    # The rewards of the first group are .7, 0, .1, -.1: mean .175. The second group is equal.
    assert result.advantages.tolist() == pytest.approx([0.525, -0.175, -0.075, -0.275, 0.0, 0.0])
    assert result.signs.tolist() == [1.0, -1.0, -1.0, -1.0, 0.0, 0.0]
    assert result.zero_spread.tolist() == [False] * 4 + [True] * 2
    # A score at the mean has no sign, whatever the penalty.
    middle = group_relative_advantages(
        torch.tensor([0.9, 0.4, -0.1]), codes[:3], ALL[:3], scores=torch.tensor([1.0, 0.5, 0.0])
    )
    assert middle.signs.tolist() == [1.0, 0.0, -1.0]


def test_rows_that_are_not_live_get_zero_and_count_for_nothing():
    live = [True, True, False, True, False]
    result = advantages_of([1.0, 0.0, 100.0, 0.0, 5.0], [0, 0, 0, 0, 1], live)
    alone = advantages_of([1.0, 0.0, 0.0], [0, 0, 0])
    assert result.advantages[[0, 1, 3]].tolist() == alone.advantages.tolist()
    assert result.advantages[[2, 4]].tolist() == [0.0, 0.0]
    assert (result.groups, result.zero_spread_groups) == (1, 0)
    assert not result.zero_spread.any()


def test_a_dead_row_cannot_hide_a_spread_by_its_size():
    result = advantages_of([1e-3, 0.0, 1e9], [0, 0, 0], [True, True, False])
    assert result.advantages[0] > 0 > result.advantages[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dead_rows_may_hold_anything(bad):
    result = advantages_of([1.0, 0.0, bad], [0, 0, 0], [True, True, False])
    assert torch.isfinite(result.advantages).all()
    assert result.advantages[2] == 0


def test_a_group_with_one_live_row_gets_zero():
    result = advantages_of([3.0, 1.0], [0, 0], [True, False])
    assert result.advantages.tolist() == [0.0, 0.0]
    assert result.zero_spread.tolist() == [True, False]
    assert (result.groups, result.zero_spread_groups) == (1, 1)


def test_an_empty_batch():
    result = advantages_of([], [])
    assert result.advantages.shape == (0,)
    assert (result.groups, result.zero_spread_groups) == (0, 0)


groups = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([0.0, 1.0, 0.1, 0.7, -2.5]), st.booleans()),
    min_size=1,
    max_size=40,
)


@given(groups, st.booleans())
@settings(max_examples=150, deadline=None)
def test_agrees_with_the_equation(rows, normalize):
    codes, rewards, live = map(list, zip(*rows, strict=True))
    result = advantages_of(
        np.float32(rewards).astype(np.float64), codes, live, normalize_by_std=normalize
    )
    expected = oracle(np.float32(rewards), codes, live, normalize)
    np.testing.assert_allclose(result.advantages, expected, rtol=1e-9, atol=2e-6)
    occupied = {c for c, alive in zip(codes, live, strict=True) if alive}
    assert result.groups == len(occupied)


@given(groups, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_responses_does_not_matter(rows, random):
    codes, rewards, live = map(list, zip(*rows, strict=True))
    order = list(range(len(rows)))
    random.shuffle(order)
    plain = advantages_of(rewards, codes, live)
    shuffled = advantages_of(
        [rewards[i] for i in order], [codes[i] for i in order], [live[i] for i in order]
    )
    torch.testing.assert_close(shuffled.advantages, plain.advantages[order])
