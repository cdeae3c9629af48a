import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_batches import token_batch

from hpo_verl.algorithms import hpo as module
from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.hpo import AHPOSettings, HPOSettings
from hpo_verl.errors import ConfigError


def hysteretic_advantages(rewards, groups, live, settings, *, normalize_by_std=True):
    rollout = Rollout(rewards, groups, live, live[:, None], normalize_by_std)
    return module.hysteretic_advantages(rollout, settings)


def advantages_of(rewards, codes, settings, live=None, **options):
    rewards = torch.tensor(rewards)
    live = torch.ones(len(rewards)) if live is None else torch.tensor(live)
    return hysteretic_advantages(
        rewards, torch.tensor(codes).long(), live.bool(), settings, **options
    )


def test_defaults_are_those_of_the_decisions():
    assert HPOSettings() == HPOSettings(alpha=0.6, zero_advantage="ignore")
    assert AHPOSettings() == AHPOSettings(alpha_min=0.1, zero_advantage="ignore")


@pytest.mark.parametrize(("kind", "key"), [(HPOSettings, "alpha"), (AHPOSettings, "alpha_min")])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_a_weight_out_of_range_is_refused_by_its_path(kind, key, value):
    message = re.escape(f"algorithm.hpo.{key} = {value!r}: must be a number in [0, 1]")
    with pytest.raises(ConfigError, match=f"^{message}"):
        kind(**{key: value})


@pytest.mark.parametrize("kind", [HPOSettings, AHPOSettings])
def test_zero_advantage_is_one_of_two_words(kind):
    assert kind(zero_advantage="negative").zero_advantage == "negative"
    with pytest.raises(
        ConfigError,
        match=r"^algorithm\.hpo\.zero_advantage = 'both': must be one of ignore, negative$",
    ):
        kind(zero_advantage="both")


def test_fixed_weight_ignores_the_counts():
    weight = HPOSettings(alpha=1).weight(0, 5, {})
    assert (weight, type(weight)) == (1.0, float)
    assert HPOSettings(alpha=0.25).weight(3, 1, {}) == 0.25


@pytest.mark.parametrize(
    ("positives", "negatives", "alpha_min", "expected"),
    [
        (1, 9, 0.1, 1 / 9),  # success .1
        (2, 8, 0.1, 0.25),  # .2
        (3, 7, 0.1, 3 / 7),  # .3
        (3, 5, 0.1, 0.6),  # .375, the best fixed weight of the paper
        (5, 5, 0.1, 1.0),  # .5
        (9, 1, 0.1, 1.0),  # bounded above
        (1, 31, 0.1, 0.1),  # bounded below
        (1, 31, 0.0, 1 / 31),
        (0, 5, 0.1, 0.1),
        (0, 5, 0.0, 0.0),
        (0, 0, 0.1, 1.0),  # nothing to damp
        (4, 0, 0.1, 1.0),
        (0, 1, 0.3, 0.3),
    ],
)
def test_the_adaptive_weight_is_the_bounded_ratio_of_counts(
    positives, negatives, alpha_min, expected
):
    weight = AHPOSettings(alpha_min=alpha_min).weight(positives, negatives, {})
    assert weight == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_only_negatives_are_weighted(alpha):
    result = advantages_of([1.0, 0.0, 0.3, 0.2], [0] * 4, HPOSettings(alpha=alpha))
    plain = result.unweighted
    assert (plain > 0).any()
    assert torch.equal(result.values, torch.where(plain < 0, alpha * plain, plain))


def test_hand_derived_batch():
    # Group 0: rewards 1 0 0 0, advantages 1.5 -.5 -.5 -.5; group 1: equal, 0.
    batch = ([1.0, 0.0, 0.0, 0.0, 0.7, 0.7], [0, 0, 0, 0, 1, 1])
    fixed = advantages_of(*batch, HPOSettings(alpha=0.6))
    np.testing.assert_allclose(fixed.values, [1.5, -0.3, -0.3, -0.3, 0, 0], rtol=1e-5)
    adaptive = advantages_of(*batch, AHPOSettings())
    np.testing.assert_allclose(
        adaptive.values, [1.5, -0.5 / 3, -0.5 / 3, -0.5 / 3, 0, 0], rtol=1e-5
    )
    np.testing.assert_allclose(adaptive.unweighted, [1.5, -0.5, -0.5, -0.5, 0, 0], rtol=1e-5)
    assert (adaptive.positives, adaptive.negatives) == (1, 3)
    assert adaptive.alpha == pytest.approx(1 / 3)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7, -0.3])
@pytest.mark.parametrize("kind", [HPOSettings, AHPOSettings])
def test_t7_groups_of_equal_rewards_leave_the_weight_alone(reward, kind):
    mixed = ([1.0, 0.0, 0.0], [0, 0, 0])
    more = ([1.0, 0.0, 0.0] + [reward] * 7, [0, 0, 0] + [1] * 7)
    assert advantages_of(*more, kind()).alpha == advantages_of(*mixed, kind()).alpha


def test_failed_groups_may_count_as_negatives():
    batch = ([1.0, 0.0, 0.0, 0.0, -1.0, -1.0, 1.0, 1.0], [0, 0, 1, 1, 2, 2, 3, 3])
    ignoring = advantages_of(*batch, AHPOSettings())
    counting = advantages_of(*batch, AHPOSettings(zero_advantage="negative"))
    assert (ignoring.positives, ignoring.negatives, ignoring.alpha) == (1, 1, 1.0)
    assert (counting.positives, counting.negatives, counting.alpha) == (1, 5, 0.2)
    assert counting.values[2:].tolist() == [0.0] * 6


def test_a_failed_group_of_one_counts_as_negative_too():
    batch = ([1.0, 0.0, 0.0], [0, 0, 1])
    assert advantages_of(*batch, AHPOSettings(zero_advantage="negative")).negatives == 2


def test_rows_that_are_not_live_are_no_negatives():
    batch = ([1.0, 0.0, 0.0, 0.0], [0, 0, 1, 1])
    counted = advantages_of(*batch, AHPOSettings(zero_advantage="negative"), live=[1, 1, 1, 0])
    assert (counted.positives, counted.negatives) == (1, 2)


def test_no_positives_and_no_negatives():
    nothing = advantages_of([0.0, 0.0], [0, 0], AHPOSettings())
    assert (nothing.positives, nothing.negatives, nothing.alpha) == (0, 0, 1.0)
    failed = advantages_of([0.0, 0.0], [0, 0], AHPOSettings(zero_advantage="negative"))
    assert (failed.positives, failed.negatives, failed.alpha) == (0, 2, 0.1)


def test_the_difference_from_the_mean_is_weighted_as_well():
    result = advantages_of(
        [1.0, 0.0, 0.0, 0.0], [0] * 4, HPOSettings(alpha=0.5), normalize_by_std=False
    )
    assert result.values.tolist() == [0.75, -0.125, -0.125, -0.125]
    scaled = advantages_of([1.0, 0.0, 0.0, 0.0], [0] * 4, HPOSettings(alpha=0.5))
    assert scaled.values[0] == pytest.approx(1.5, rel=1e-5)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0])), min_size=1, max_size=40),
    st.floats(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_the_weight_stays_within_its_bounds(rows, alpha_min):
    codes, rewards = map(list, zip(*rows, strict=True))
    result = advantages_of(rewards, codes, AHPOSettings(alpha_min=alpha_min))
    assert alpha_min <= result.alpha <= 1
    positive = result.unweighted > 0
    assert torch.equal(result.values[positive], result.unweighted[positive])
    torch.testing.assert_close(
        result.values[~positive], result.alpha * result.unweighted[~positive]
    )


# ---------------------------------------------------------------- the loss

LOW, HIGH = 0.2, 0.3
RATIOS = [0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 2.0]


def loss_of(ratios, advantage, low=LOW, high=HIGH, **options):
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    batch = token_batch(log_ratio, torch.full_like(log_ratio, advantage), (low, high))
    return module.LOSS.token_loss(batch._replace(**options), None)


def objective(batch, settings):
    """The equation; `test_records` compares values and slopes with it."""
    ratio, (low, high) = batch.log_ratio.exp(), batch.clip_range
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)


def test_every_branch_with_hand_derived_numbers():
    # A = 2: the ratio is cut above 1.3; A = -2: below 0.8. The other side is free.
    positive = loss_of(RATIOS, 2.0)
    np.testing.assert_allclose(
        positive.values, [-1.0, -1.58, -1.62, -2.0, -2.58, -2.6, -2.6], rtol=1e-12
    )
    np.testing.assert_allclose(positive.slopes, [-1.0, -1.58, -1.62, -2.0, -2.58, 0, 0], rtol=1e-12)
    negative = loss_of(RATIOS, -2.0)
    np.testing.assert_allclose(negative.values, [1.6, 1.6, 1.62, 2.0, 2.58, 2.62, 4.0], rtol=1e-12)
    np.testing.assert_allclose(negative.slopes, [0, 0, 1.62, 2.0, 2.58, 2.62, 4.0], rtol=1e-12)


def test_the_second_clip_is_off_unless_it_is_asked_for():
    loss = loss_of([1e6], -1.0)
    assert loss.values.item() == pytest.approx(1e6)
    assert loss.slopes.item() == pytest.approx(1e6)
    clipped = loss_of([2.0, 1e6], -1.0, clip_ratio_c=3.0)
    assert clipped.values.tolist() == pytest.approx([2.0, 3.0])
    assert clipped.slopes.tolist() == pytest.approx([2.0, 0.0])
