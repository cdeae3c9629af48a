import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_batches import token_batch

from hpo_verl.algorithms import bapo as module
from hpo_verl.algorithms.bapo import BAPOSettings, ClipBounds, find_clip_bounds
from hpo_verl.algorithms.base import TokenBatch
from hpo_verl.core.surrogate import clipped_surrogate
from hpo_verl.errors import ConfigError


def bapo_loss(log_ratio, advantages, low, high):
    bounds = ClipBounds(low, high, 0.5)
    return module.bapo_loss(token_batch(log_ratio, advantages, mini_batch=bounds), BAPOSettings())


def contributions(log_ratio, old_log_prob, advantages, mask, settings):
    batch = TokenBatch(log_ratio, advantages, mask, old_log_prob)
    return module.contributions(batch, settings)


PATH = "actor_rollout_ref.actor.policy_loss"
NAN = float("nan")
SMALL = {
    "clip_low_start": 0.6, "clip_low_end": 0.8, "clip_low_step": 0.1,
    "clip_high_start": 1.2, "clip_high_end": 2.0, "clip_high_step": 0.4,
}  # fmt: skip


def test_defaults_are_the_papers():
    assert BAPOSettings() == BAPOSettings(0.4, 0.6, 0.9, 0.02, 1.2, 3.0, 0.05, False)
    assert len(BAPOSettings().lower_bounds) == 16
    assert len(BAPOSettings().upper_bounds) == 37
    assert BAPOSettings().lower_bounds[-1] == pytest.approx(0.9)
    assert BAPOSettings().upper_bounds[-1] == pytest.approx(3.0)


def test_a_range_is_reached_to_its_end_by_a_shorter_last_step():
    options = BAPOSettings(clip_high_start=1.0, clip_high_end=2.0, clip_high_step=0.3)
    assert options.upper_bounds == pytest.approx([1.0, 1.3, 1.6, 1.9, 2.0])
    assert options.upper_bounds[-1] == 2.0
    code = BAPOSettings(clip_low_start=0.8, clip_low_end=0.95, clip_low_step=0.1)
    assert code.lower_bounds == pytest.approx([0.8, 0.9, 0.95])
    wide = BAPOSettings(clip_low_start=0.6, clip_low_end=0.7, clip_low_step=0.5)
    assert wide.lower_bounds == (0.6, 0.7)
    still = BAPOSettings(clip_low_start=0.7, clip_low_end=0.7)
    assert still.lower_bounds == (0.7,)


def sums_of(ratios, probabilities, advantages, **changes):
    given = torch.tensor([ratios, probabilities, advantages], dtype=torch.float64)
    ratios, probabilities, advantages = given
    settings = BAPOSettings(**{**SMALL, **changes})
    mask = torch.ones_like(ratios).bool()
    return contributions(ratios.log(), probabilities.log(), advantages, mask, settings)


def test_hand_derived_contributions():
    # Ratio and pi_old: 0.5 0.5, 1.5 0.1, 3 0.2 with A = 2; 0.5 0.4, 0.75 0.2, 2 1 with A = -1.
    sums = sums_of(
        [0.5, 1.5, 3.0, 0.5, 0.75, 2.0, 9.0], [0.5, 0.1, 0.2, 0.4, 0.2, 1.0, 0.5],
        [2.0, 2.0, 2.0, -1.0, -1.0, -1.0, 0.0],
    )  # fmt: skip
    positive = [0.5 + 0.2 * min(1.5, c) + 0.4 * c for c in (1.2, 1.6, 2.0)]
    negative = [0.4 * c + 0.2 * max(0.75, c) + 2.0 for c in (0.6, 0.7, 0.8)]
    np.testing.assert_allclose(sums, positive + negative, rtol=1e-12)


def test_the_public_codes_sums_leave_the_probability_out():
    sums = sums_of([3.0, 0.5], [0.2, 0.4], [2.0, -1.0], repo_compatible=True)
    np.testing.assert_allclose(sums, [2.4, 3.2, 4.0, 0.6, 0.7, 0.8], rtol=1e-12)


def random_batch(seed=0, rows=12):
    generator = torch.Generator().manual_seed(seed)
    log_ratio, advantages = torch.randn(2, rows, 16, generator=generator, dtype=torch.float64)
    old = -torch.rand(rows, 16, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, 16, generator=generator) < 0.8
    return log_ratio / 2, old, advantages * mask, mask


@pytest.mark.parametrize("repo", [False, True])
def test_parts_add_up_to_the_whole(repo):
    options = BAPOSettings(repo_compatible=repo)
    batch = random_batch()
    whole = contributions(*batch, options)
    parts = [
        contributions(*(tensor[rows] for tensor in batch), options)
        for rows in ([0, 5], [1, 2, 3, 4], [6], [7, 8, 9, 10, 11])
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)
    assert (
        find_clip_bounds(sum(parts).tolist(), options)[:2]
        == find_clip_bounds(whole.tolist(), options)[:2]
    )


# ---------------------------------------------------------------- search

LOWS, HIGHS = [0.6, 0.7, 0.8], [1.2, 1.6, 2.0]


def search(positive, negative, share, **changes):
    options = BAPOSettings(**{**SMALL, "positive_share": share, **changes})
    return find_clip_bounds([*positive, *negative], options)


@pytest.mark.parametrize(
    ("share", "repo", "expected"),
    [
        # Positive sums 2, 4, 6 against 6: shares 1/4, 2/5, 1/2.
        (0.25, False, (0.6, 1.2, 0.25)),
        (0.3, False, (0.6, 1.6, 0.4)),
        (0.4, False, (0.6, 1.6, 0.4)),
        (0.5, False, (0.6, 2.0, 0.5)),
        # Out of reach: the upper bound first, then the lower, both to their ends (6, 7, 8).
        (0.6, False, (0.8, 2.0, 6 / 14)),
        # The public code raises the lower bound to its end first.
        (0.25, True, (0.6, 1.2, 0.25)),
        (0.3, True, (0.8, 1.6, 4 / 12)),
        (0.6, True, (0.8, 2.0, 6 / 14)),
        (0.0, True, (0.6, 1.2, 0.25)),
    ],
)
def test_hand_derived_searches(share, repo, expected):
    bounds = search([2.0, 4.0, 6.0], [6.0, 7.0, 8.0], share, repo_compatible=repo)
    assert bounds == pytest.approx(expected)


def test_the_lower_bound_stops_where_the_share_is_reached():
    # No sums of real tokens fall as c_low rises; the search does not rely on that.
    bounds = search([1.0, 1.0, 1.0], [3.0, 2.0, 1.0], 1 / 3)
    assert bounds == pytest.approx((0.7, 2.0, 1 / 3))


def test_without_one_sign_or_both():
    assert search([0.0] * 3, [0.0] * 3, 0.4) == ClipBounds(0.6, 1.2, 0.0)
    assert search([1.0] * 3, [0.0] * 3, 1.0) == ClipBounds(0.6, 1.2, 1.0)
    assert search([0.0] * 3, [1.0] * 3, 0.4) == pytest.approx((0.8, 2.0, 0.0))


def test_a_share_equal_to_the_target_reaches_it_whatever_the_rounding():
    for noise in (-1e-14, 0.0, 1e-14):
        assert search([4.0 * (1 + noise)] * 3, [6.0] * 3, 0.4)[:2] == (0.6, 1.2)


def test_t12_share_and_quotient_of_the_public_code_are_the_same_target():
    for share in (0.2, 1 / 3, 0.4, 0.5):
        quotient = share / (1 - share)
        for positive in (0.9, 1.1):
            reached = positive * quotient * 6 >= quotient * 6
            bounds = search([positive * quotient * 6] * 3, [6.0] * 3, share)
            assert (bounds[:2] == (0.6, 1.2)) == reached


@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_search_ends_within_its_ranges_and_as_early_as_it_can(seed, share, repo):
    options = BAPOSettings(positive_share=share, repo_compatible=repo)
    sums = contributions(*random_batch(seed, 4), options)
    lows, highs = options.lower_bounds, options.upper_bounds
    positive, negative = sums[: len(highs)], sums[len(highs) :]
    bounds = find_clip_bounds(sums.tolist(), options)
    assert bounds.bapo_low in lows
    assert bounds.bapo_high in highs
    # Raising c_high raises P; raising c_low raises N, and so never the share.
    assert (positive.diff() >= 0).all()
    assert (negative.diff() >= 0).all()
    if bounds.bapo_positive_share < share - 1e-6:
        assert (bounds.bapo_low, bounds.bapo_high) == (lows[-1], highs[-1])
    elif not repo:
        assert bounds.bapo_low == lows[0]
        before = highs.index(bounds.bapo_high) - 1
        if before >= 0:
            assert positive[before] / (positive[before] + negative[0]) < share


# ---------------------------------------------------------------- loss


def test_every_branch_with_hand_derived_numbers():
    log_ratio = torch.tensor([0.5, 1.0, 1.7, 1.9, 0.5, 0.69, 0.71, 1.9]).double().log()
    advantages = torch.tensor([2.0] * 4 + [-2.0] * 4).double()
    loss = bapo_loss(log_ratio, advantages, 0.7, 1.8)
    np.testing.assert_allclose(loss.values, [-1, -2, -3.4, -3.6, 1.4, 1.4, 1.42, 3.8], rtol=1e-6)
    np.testing.assert_allclose(loss.slopes, [-1, -2, -3.4, 0, 0, 0, 1.42, 3.8], rtol=1e-6)


def test_bounds_of_ppo_give_ppo():
    log_ratio, _, advantages, _ = random_batch()
    ours = bapo_loss(log_ratio, advantages, 0.8, 1.2)
    ppo = clipped_surrogate(log_ratio, advantages, 0.2, 0.2)
    torch.testing.assert_close(ours.values, ppo.values)
    torch.testing.assert_close(ours.slopes, ppo.slopes)


def test_the_contributions_are_the_values_of_the_loss():
    """Without probabilities P and N are minus and plus the loss of each sign."""
    log_ratio, old, advantages, mask = random_batch()
    options = BAPOSettings(**SMALL, repo_compatible=True)
    sums = contributions(log_ratio, old, advantages, mask, options)
    for i, (low, high) in enumerate(zip(LOWS, HIGHS, strict=True)):
        values = bapo_loss(log_ratio, advantages, low, high).values
        assert sums[i].item() == pytest.approx(-values[advantages > 0].sum().item())
        assert sums[3 + i].item() == pytest.approx(values[advantages < 0].sum().item())


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positive_share": 1.1}, "positive_share = 1.1: must be a number in [0, 1]"),
        ({"positive_share": "x"}, "positive_share = 'x': must be a number in [0, 1]"),
        ({"clip_low_start": -0.1}, "clip_low_start = -0.1: must be a number in [0, 1]"),
        ({"clip_low_end": 0.5}, "clip_low_end = 0.5: must be a number in [0.6, 1]"),
        ({"clip_low_end": 1.1}, "clip_low_end = 1.1: must be a number in [0.6, 1]"),
        ({"clip_low_step": 0.0}, "clip_low_step = 0.0: must be a number in [0.0003, inf)"),
        ({"clip_low_step": NAN}, "clip_low_step = nan: must be a number"),
        ({"clip_high_start": 0.9}, "clip_high_start = 0.9: must be a number in [1, inf)"),
        ({"clip_high_end": 1.1}, "clip_high_end = 1.1: must be a number in [1.2, inf)"),
        ({"clip_high_end": math.inf}, "clip_high_end = inf: must be a number in [1.2, inf)"),
        ({"clip_high_step": 1e-9}, "clip_high_step = 1e-09: must be a number in [0.0018, inf)"),
        (
            {"clip_high_end": 1.2, "clip_high_step": 0},
            "clip_high_step = 0: must be a number in (0, inf)",
        ),
        ({"repo_compatible": "no"}, "repo_compatible = 'no': must be true or false"),
    ],
)
def test_bad_settings_name_key_value_and_range(changes, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{PATH}.{message}')}"):
        BAPOSettings(**changes)


def objective(batch, settings):
    """The equation; `test_records` compares values and slopes with it."""
    ratio, bounds = batch.log_ratio.exp(), batch.extras["mini_batch"]
    clipped = ratio.clamp(bounds.bapo_low, bounds.bapo_high)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
