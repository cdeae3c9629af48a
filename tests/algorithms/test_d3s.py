import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_verl.algorithms.d3s import D3SSettings, down_sample, kept_count, most_spread
from hpo_verl.errors import ConfigError

NAN = float("nan")
ALL = {
    "response_share_start": 1.0, "response_share_end": 1.0,
    "token_share_start": 1.0, "token_share_end": 1.0,
}  # fmt: skip


def variance(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def largest_variance(values, count):
    """Over every subset of the given size."""
    return max(map(variance, itertools.combinations(values, count)))


def down(advantages, entropy, mask=None, progress=0.0, **shares):
    entropy = torch.tensor(entropy, dtype=torch.float64)
    mask = torch.ones_like(entropy) if mask is None else torch.tensor(mask)
    return down_sample(
        torch.tensor(advantages, dtype=torch.float64),
        entropy,
        mask.bool(),
        D3SSettings(**(ALL | shares)),
        progress,
    )


def fractions(result):
    return tuple(result.statistics.values())


# ---------------------------------------------------------------- responses


def check_is_most_spread(values, count):
    chosen = most_spread(torch.tensor(values, dtype=torch.float64), count).tolist()
    assert len(set(chosen)) == count
    reached = variance([values[i] for i in chosen])
    assert reached == pytest.approx(largest_variance(values, count), rel=1e-9, abs=1e-12)
    # They are the k largest and the count - k smallest for some k.
    ordered = sorted(values)
    taken = sorted(values[i] for i in chosen)
    assert any(taken == ordered[: count - k] + ordered[len(values) - k :] for k in range(count + 1))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_no_subset_of_any_batch_of_small_integers_has_a_larger_variance(size):
    for values in itertools.combinations_with_replacement([-2.0, -1.0, 0.0, 1.0, 3.0], size):
        for count in range(1, size + 1):
            check_is_most_spread(list(values), count)


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=10), st.integers(1, 10))
@settings(max_examples=150, deadline=None)
def test_no_subset_of_real_values_has_a_larger_variance(values, count):
    check_is_most_spread(values, min(count, len(values)))


@pytest.mark.parametrize(
    ("values", "count", "kept"),
    [
        # 3 and -1 have variance 4, 3 and 0 only 2.25.
        ([0.0, 3.0, -1.0], 2, [-1.0, 3.0]),
        # k = 1: one success, three failures (variance 0.75); k = 2 would take a 0 (0.672).
        ([1.5, -0.5, -0.5, -0.5, 0.0, 0.0], 4, [-0.5, -0.5, -0.5, 1.5]),
        # k = 2 of 3: 1, 1, -1 (0.889); k = 1: 1, -1, -0.9 (0.847).
        ([1.0, 1.0, 1.0, -1.0, -0.9, 0.1], 3, [-1.0, 1.0, 1.0]),
        # k = 0 and k = count only where there is nothing to choose.
        ([1.0, -1.0], 2, [-1.0, 1.0]),
        ([1.0, -1.0], 0, []),
    ],
)
def test_the_chosen_responses_by_hand(values, count, kept):
    values = torch.tensor(values)
    assert values[most_spread(values, count)].sort().values.tolist() == kept


def test_ties_go_by_position():
    values = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.5, -0.5])
    assert most_spread(values, 2).tolist() == [1, 4]
    assert torch.equal(most_spread(values, 2), most_spread(values.clone(), 2))


@given(st.permutations(list(range(9))))
@settings(max_examples=40, deadline=None)
def test_the_order_of_responses_does_not_change_which_values_are_kept(order):
    values = torch.tensor([2.0, 1.5, 0.1, 0.0, -0.2, -0.3, -0.31, -1.0, 0.7])
    shuffled = values[torch.tensor(order)]
    for count in range(10):
        kept = values[most_spread(values, count)].sort().values
        assert torch.equal(shuffled[most_spread(shuffled, count)].sort().values, kept)


@pytest.mark.parametrize(
    ("share", "size", "at_least", "count"),
    [
        (0.5, 5, 1, 3), (0.1, 3, 1, 1), (1.0, 7, 1, 7), (0.25, 8, 2, 2), (0.1, 8, 2, 2),
        (0.1, 1, 2, 1), (0.9, 0, 2, 0), (0.2, 10, 1, 2), (0.24, 10, 1, 2), (0.26, 10, 1, 3),
    ],
)  # fmt: skip
def test_a_share_becomes_the_nearest_count_within_bounds(share, size, at_least, count):
    assert kept_count(share, size, at_least) == count


# ---------------------------------------------------------------- tokens


def test_both_levels_by_hand():
    # Half of four responses: 1.5 and -0.6 (variance 1.1025). Of their 4 live tokens half:
    # |A| H = 1.5 * .2 = .3, 1.5 * .4 = .6, .6 * .9 = .54, .6 * .1 = .06.
    result = down(
        [1.5, -0.5, -0.6, -0.4],
        [[0.2, 0.4], [9.0, 9.0], [0.9, 0.1], [9.0, 9.0]],
        response_share_start=0.5,
        token_share_start=0.5,
    )
    assert result.values.tolist() == [[0, 1.5], [0, 0], [-0.6, 0], [0, 0]]
    assert fractions(result) == (0.5, 0.25)


def test_tokens_are_ranked_over_the_batch_and_not_per_response():
    result = down([1.0, -1.0], [[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]], token_share_start=0.5)
    assert result.values.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_entropy_alone_does_not_decide():
    result = down([2.0, -0.1], [[0.2], [1.0]], token_share_start=0.5)
    assert result.values.tolist() == [[2.0], [0.0]]


def test_equal_scores_go_by_position():
    result = down([1.0, -1.0], [[0.5, 0.5], [0.5, 0.5]], token_share_start=0.75)
    assert result.values.tolist() == [[1, 1], [-1, 0]]


def test_shares_of_one_change_nothing():
    mask = [[1, 1, 0], [1, 1, 1]]
    result = down([1.0, -0.5], [[0.1, 0.0, 9.0], [0.0, 0.0, 2.0]], mask)
    assert result.values.tolist() == [[1, 1, 0], [-0.5, -0.5, -0.5]]
    assert fractions(result) == (1, 1)


@pytest.mark.parametrize("junk", [NAN, float("inf"), 1e30])
def test_masked_tokens_and_empty_rows_count_for_nothing(junk):
    shares = {"response_share_start": 0.5, "token_share_start": 0.5}
    plain = down([1.5, -0.5, -0.6, -0.4], [[0.2, 0.4], [9, 9], [0.9, 0.1], [9, 9]], **shares)
    padded = down(
        [1.5, -0.5, -0.6, -0.4, 0.0, 0.0],
        [[0.2, 0.4, junk], [9, 9, junk], [0.9, 0.1, junk], [9, 9, junk], [junk] * 3, [0, 0, junk]],
        [[1, 1, 0]] * 4 + [[0, 0, 0]] * 2,
        **shares,
    )
    assert torch.equal(padded.values[:4, :2], plain.values)
    assert (padded.values[4:] == 0).all()
    assert (padded.values[:, 2] == 0).all()
    assert fractions(padded) == fractions(plain)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 2)])
def test_a_batch_without_a_live_token_gives_zeros(shape):
    result = down_sample(
        torch.zeros(shape[0]), torch.zeros(shape), torch.zeros(shape).bool(), D3SSettings(), 0.5
    )
    assert result.values.shape == shape
    assert (result.values == 0).all()
    assert fractions(result) == (0, 0)


def test_one_response_is_kept_whatever_the_share():
    result = down([0.0], [[0.3, 0.2]], response_share_start=0.01, token_share_start=0.01)
    assert fractions(result) == (1, 0.5)


def test_two_responses_are_kept_since_one_has_no_variance():
    result = down([1.0, 0.9, -1.0], [[0.5]] * 3, response_share_start=0.01)
    assert result.values.squeeze(-1).tolist() == [1.0, 0.0, -1.0]


# ---------------------------------------------------------------- settings


def test_the_schedule_is_linear_in_progress():
    settings = D3SSettings(0.2, 0.6, 0.1, 0.9)
    assert settings.shares(0.0) == (0.2, 0.1)
    assert settings.shares(1.0) == (0.6, 0.9)
    assert settings.shares(0.25) == pytest.approx((0.3, 0.3))


def test_the_defaults_start_with_few_and_use_under_a_fifth_of_the_tokens():
    used = [a * b for a, b in (D3SSettings().shares(i / 100) for i in range(101))]
    assert used == sorted(used)
    assert sum(used) / len(used) == pytest.approx(0.1375, rel=1e-3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, NAN, "0.5", None, True])
def test_shares_out_of_range_are_refused_by_their_path(name, value):
    message = f"algorithm.d3s.{name} = {value!r}: must be a number in (0, 1]"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        D3SSettings(**{name: value})
