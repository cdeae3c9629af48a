"""Settings of HPO beyond its paper, with numbers derived by hand."""

import re

import pytest
import torch

from hpo_verl.algorithms.base import Advantages, Rollout
from hpo_verl.algorithms.hpo import (
    ALGORITHMS,
    AdaptiveWeight,
    AHPOSettings,
    FixedWeight,
    HPOSettings,
    hysteretic_advantages,
    weigh,
)
from hpo_verl.errors import ConfigError

LENGTHS = [2, 4, 6, 8, 3, 1]
# Advantages 1.5 -.5 -.5 -.5 of lengths 2 to 8, and a dead group of lengths 3 and 1.
REWARDS, CODES = [1.0, 0.0, 0.0, 0.0, 0.7, 0.7], [0, 0, 0, 0, 1, 1]


def rollout_of(rewards=REWARDS, codes=CODES, lengths=LENGTHS, by_std=True, **extras):
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    live = mask.any(dim=-1)
    return Rollout(torch.tensor(rewards), torch.tensor(codes), live, mask, by_std, extras)


def advantages(settings, *arguments, **options):
    return hysteretic_advantages(rollout_of(*arguments, **options), settings)


def test_a_weight_for_positives():
    # W-REINFORCE's weights.
    result = advantages(HPOSettings(alpha=1.0, positive_weight=0.1))
    assert result.values.tolist() == pytest.approx([0.15, -0.5, -0.5, -0.5, 0, 0], rel=1e-5)
    result = advantages(AHPOSettings(positive_weight=2.0))
    assert result.values.tolist() == pytest.approx([3.0, *[-0.5 / 3] * 3, 0, 0], rel=1e-5)
    assert result.unweighted.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5, 0, 0], rel=1e-5)


@pytest.mark.parametrize(("progress", "alpha"), [(0.0, 0.2), (0.25, 0.4), (1.0, 1.0)])
def test_alpha_on_a_line_over_the_run(progress, alpha):
    settings = HPOSettings(alpha=0.2, alpha_end=1.0)
    result = advantages(settings, progress=progress)
    assert result.alpha == pytest.approx(alpha, abs=1e-15)
    assert result.values[1].item() == pytest.approx(-0.5 * alpha, rel=1e-5)


def test_the_average_of_alpha_over_steps():
    settings, memory = AHPOSettings(ema=0.75), {}
    seen = []
    # One of four, then two of four succeed, then one: counted 1/3, 1, 1/3.
    for rewards in ([1.0, 0, 0, 0], [1.0, 1.0, 0, 0], [1.0, 0, 0, 0]):
        result = advantages(settings, rewards, [0] * 4, [1] * 4, memory=memory)
        assert result.memory == {"alpha": result.alpha}
        memory = result.memory
        seen.append(result.alpha)
    assert seen == pytest.approx([1 / 3, 0.5, 0.375 + 1 / 12])
    assert advantages(AHPOSettings()).memory == {}


def test_the_mean_of_the_other_responses_as_the_baseline():
    # 1 - 0 and 0 - 1/3 in a group of four; 1 and -1 in one of two; a group of one learns nothing.
    result = advantages(
        HPOSettings(alpha=1.0, baseline="leave_one_out"),
        [1.0, 0, 0, 0, 1.0, 0, 1.0], [0, 0, 0, 0, 1, 1, 2], [1] * 7, by_std=False,
    )  # fmt: skip
    assert result.values.tolist() == pytest.approx([1.0, *[-1 / 3] * 3, 1.0, -1.0, 0.0])
    # With the deviation: times 4 / 3. Rows that do not count are no member.
    result = advantages(
        HPOSettings(alpha=0.5, baseline="leave_one_out"),
        [1.0, 0, 0, 0, 9.0],
        [0] * 5,
        [1] * 4 + [0],
    )
    assert result.values.tolist() == pytest.approx([2.0, *[-1 / 3] * 3, 0.0], rel=1e-5)


@pytest.mark.parametrize(
    # 24 tokens in six responses; 20 in the four of the group with a spread.
    ("length", "divisor"), [("rollout", 4.0), ("rollout_with_spread", 5.0)],
)  # fmt: skip
def test_the_mean_length_of_the_whole_rollout_batch(length, divisor):
    result = advantages(HPOSettings(length=length))
    expected = [1.5 / divisor, *[-0.3 / divisor] * 3, 0, 0]
    assert result.values.tolist() == pytest.approx(expected, rel=1e-5)
    assert result.statistics == {"mean_length": divisor}
    # Signs, alpha and the statistics before the weight are what they were.
    assert result.unweighted.tolist() == advantages(HPOSettings()).unweighted.tolist()


def test_without_a_spread_anywhere_all_lengths_count():
    result = advantages(HPOSettings(length="rollout_with_spread"), [0.0] * 6)
    assert result.statistics == {"mean_length": 4.0}
    nothing = advantages(HPOSettings(length="rollout"), lengths=[0] * 6)
    assert nothing.statistics == {"mean_length": 1.0}
    assert nothing.values.tolist() == [0.0] * 6


# ---------------------------------------------------------------- in front of another estimator


def test_the_weight_in_front_of_advantages_per_token():
    # Sums 1, -3 and 0 of two tokens each: one positive, one negative.
    values = torch.tensor([[2.0, -1.0], [-1.0, -2.0], [0.0, 0.0]]).double()
    rollout = rollout_of([1.0, 0, 0], [0] * 3, [2] * 3)
    rollout = rollout._replace(mask=rollout.mask[:, :2])
    result = weigh(rollout, Advantages(values), FixedWeight(alpha=0.5, positive_weight=3.0))
    assert result.values.tolist() == [[6.0, -0.5], [-0.5, -1.0], [0.0, 0.0]]
    assert result.unweighted.tolist() == [0.5, -1.5, 0.0]
    assert (result.positives, result.negatives, result.alpha) == (1, 1, 0.5)
    assert weigh(rollout, Advantages(values), AdaptiveWeight()).alpha == 1.0


def test_the_weight_in_front_keeps_what_the_estimator_reports():
    values = torch.tensor([1.0, -1.0, -1.0]).double()
    plain = Advantages(values, statistics={"mine": 2.0})
    result = weigh(rollout_of([1.0, 0, 0], [0] * 3, [2] * 3), plain, AdaptiveWeight())
    assert result.values.tolist() == [1.0, -0.5, -0.5]
    assert result.statistics == {"mine": 2.0}


# ---------------------------------------------------------------- settings


def test_all_are_off_by_default_and_need_nothing():
    assert HPOSettings() == HPOSettings("ignore", "mean", "mini_batch", 0.6, None, 1.0)
    assert AHPOSettings() == AHPOSettings("ignore", "mean", "mini_batch", 0.1, 0.0, 1.0)
    assert HPOSettings().needs == AHPOSettings().needs == ()
    assert HPOSettings(alpha_end=0.6).needs == ("progress",)
    assert AHPOSettings(ema=0.5).needs == ("memory",)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (HPOSettings, {"alpha_end": 1.1}, "alpha_end = 1.1: must be a number in [0, 1]"),
        (
            HPOSettings,
            {"positive_weight": -1},
            "positive_weight = -1: must be a number in [0, inf)",
        ),
        (AHPOSettings, {"positive_weight": True}, "positive_weight = True: must be a number"),
        (AHPOSettings, {"ema": 1.0}, "ema = 1.0: must be a number in [0, 0.999]"),
        (HPOSettings, {"baseline": "other"}, "baseline = 'other': must be one of mean, leave_one"),
        (AHPOSettings, {"length": "step"}, "length = 'step': must be one of mini_batch, rollout,"),
    ],
)
def test_bad_settings_name_key_value_and_range(kind, changes, message):
    with pytest.raises(ConfigError, match=re.escape(f"algorithm.hpo.{message}")):
        kind(**changes)


NORM = "seq-mean-token-sum-norm"


@pytest.mark.parametrize(
    ("length", "actor", "message"),
    [
        ("mini_batch", {}, None),
        ("mini_batch", {"policy_loss": {"loss_mode": "vanilla"}, "loss_agg_mode": NORM}, None),
        ("mini_batch", {"loss_agg_mode": NORM}, "takes token-mean with algorithm.hpo.length"),
        ("rollout", {"loss_agg_mode": NORM, "loss_scale_factor": 1}, None),
        ("rollout", {}, "1 / L, so actor_rollout_ref.actor.loss_agg_mode must be seq-mean-token"),
        ("rollout", {"loss_agg_mode": NORM}, "loss_scale_factor 1, not 'seq-mean-token-sum-norm'"),
        (
            "rollout_with_spread",
            {"loss_agg_mode": NORM, "loss_scale_factor": 1, "entropy_coeff": 0.01},
            "actor.entropy_coeff = 0.01: with algorithm.hpo.length = 'rollout_with_spread'",
        ),
    ],
)
def test_the_divisor_of_the_loss_goes_with_the_length(length, actor, message):
    plain = {"policy_loss": {"loss_mode": "hpo"}, "loss_agg_mode": "token-mean"}
    config = {
        "algorithm": {"hpo": {"length": length}},
        "actor_rollout_ref": {"actor": {"loss_scale_factor": None, **plain, **actor}},
    }
    check = ALGORITHMS[0].estimator.check
    if message is None:
        check(config)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(config)
