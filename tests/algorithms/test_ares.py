"""ARES by hand: windows, quantiles, buckets, the shaped reward, and the weights of the KL term."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_verl.algorithms.ares import (
    KL_WEIGHT,
    ARESSettings,
    difficulty,
    shaped_advantages,
)
from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.registry import ESTIMATORS
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.windows import high_windows, row_quantiles
from hpo_verl.errors import ConfigError

NAN = float("nan")
PATH = "algorithm.ares"

# ---------------------------------------------------------------- windows


def windows_of(entropy, width, threshold, mask=None):
    entropy = torch.tensor([entropy], dtype=torch.float64)
    mask = torch.ones_like(entropy).bool() if mask is None else torch.tensor([mask]).bool()
    begins, inside = high_windows(entropy, mask, width, threshold)
    return begins[0].long().tolist(), inside[0].long().tolist()


def test_windows_and_the_tokens_in_them_by_hand():
    # Means of two: 1, 1, 3, 5, 2.5.
    entropy = [0.0, 2.0, 0.0, 6.0, 4.0, 1.0]
    assert windows_of(entropy, 2, 2.5) == ([0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0])
    # The threshold itself is not exceeded; a window of one token is the token.
    assert windows_of(entropy, 1, 4.0) == ([0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0])
    # Wider than the response.
    assert windows_of([9.0, 9.0], 3, 1.0) == ([0, 0], [0, 0])


def test_a_window_has_live_tokens_only():
    # A tool wrote the third token; padding follows the fifth.
    entropy, mask = [3.0, 3.0, NAN, 3.0, 3.0, NAN], [1, 1, 0, 1, 1, 0]
    assert windows_of(entropy, 2, 1.0, mask) == ([1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0])


def test_quantiles_of_rows_by_hand():
    values = torch.tensor([[4.0, 1.0, 3.0, NAN], [5.0, 9.0, NAN, NAN], [7.0] * 4, [NAN] * 4])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    # Places 1.5 and 0 of the sorted 1, 3, 4 and 5; the row without a token has none.
    assert row_quantiles(values, mask, 0.75).tolist() == [3.5, 5.0, 7.0]
    assert row_quantiles(values, mask, 0.0).tolist() == [1.0, 5.0, 7.0]
    assert row_quantiles(values, mask, 1.0).tolist() == [4.0, 5.0, 7.0]


@given(st.lists(st.floats(0, 9), min_size=1, max_size=30), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_quantile_is_that_of_torch(values, quantile):
    row = torch.tensor([values], dtype=torch.float64)
    found = row_quantiles(row, torch.ones_like(row).bool(), quantile)
    torch.testing.assert_close(found, row.quantile(quantile, dim=-1), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- buckets


def test_difficulty_by_the_share_of_successes_at_its_bounds():
    # 3 of 3, 2 of 3, 1 of 3, 0 of 3; the last has one row that does not count.
    success = torch.tensor([1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0]).bool()
    groups = torch.arange(4).repeat_interleave(3)
    live = torch.ones(12).bool()
    rollout = Rollout(success.float(), groups, live, live[:, None])
    assert difficulty(rollout, success).view(4, 3)[:, 0].tolist() == [0, 0, 1, 2]
    live[5] = False
    assert difficulty(rollout, success)[3] == 0


# ---------------------------------------------------------------- the shaped reward

# Windows of one token, threshold 1: N is the number of tokens of entropy 2.
COUNTS = [0, 1, 3, 4]
ENTROPY = torch.tensor([[2.0] * n + [0.0] * (4 - n) for n in COUNTS])
GROUP, LIVE = torch.zeros(4, dtype=torch.int64), torch.ones(4).bool()
MASK = torch.ones(4, 4).bool()


def estimate(rewards, memory=None, mask=MASK, entropy=ENTROPY, **changes):
    rollout = Rollout(
        torch.tensor(rewards), GROUP, mask.any(dim=-1), mask,
        extras={"entropy": entropy, "memory": memory or {}},
    )  # fmt: skip
    # quantile 0.5: thresholds 0, 0, 2, 2 of the responses, so the mean is 1.
    options = {"window": 1, "quantile": 0.5, "epsilon": 0.5, "penalty_limit": 9.0, **changes}
    return shaped_advantages(rollout, ARESSettings(**options))


def of(rewards):
    """GRPO's advantages."""
    exact = torch.tensor(rewards, dtype=torch.float64)
    return group_relative_advantages(exact, GROUP, LIVE).advantages


def test_without_a_history_there_is_no_penalty_and_the_targets_begin():
    result = estimate([1.0, 0.0, 1.0, 1.0])
    assert result.values.tolist() == of([1.0, 0.0, 1.0, 1.0]).tolist()
    assert result.memory == {"ares_threshold": 1.0, "ares_target_easy": 2.0}
    assert result.statistics["ares_windows"] == 2.0
    assert result.statistics["ares_penalty"] == 0.0


@pytest.mark.parametrize(
    ("bucket", "rewards", "penalties"),
    [
        # The mean is 2, the variance 2.5, the target 1: lambda = 1 / 3.
        ("easy", [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]),
        ("easy", [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]),
        ("medium", [0.0, 0.0, 1.0, 1.0], [1 / 3, 0.0, 0.0, 0.0]),
        ("medium", [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2 / 3, 1.0]),
        ("hard", [0.0, 0.0, 0.0, 1.0], [1 / 3, 0.0, 0.0, 0.0]),
        ("hard", [0.0, 0.0, 0.0, 0.0], [1 / 3, 0.0, 0.0, 0.0]),
    ],
)
def test_every_direction_of_the_penalty_by_hand(bucket, rewards, penalties):
    key = f"ares_target_{bucket}"
    result = estimate(rewards, {key: 1.0}, target_decay=0.75)
    shaped = [reward - penalty for reward, penalty in zip(rewards, penalties, strict=True)]
    torch.testing.assert_close(result.values, of(shaped), rtol=1e-9, atol=1e-9)
    assert result.memory[key] == pytest.approx(0.75 * 1.0 + 0.25 * 2.0)
    assert result.statistics["ares_penalty"] == pytest.approx(sum(penalties) / 4)
    assert result.statistics[f"ares_{bucket}_fraction"] == 1.0


def test_below_the_target_and_with_the_batchs_own_mean_the_multiplier_is_zero():
    for target in (2.0, 3.0):
        result = estimate([0.0, 0.0, 1.0, 1.0], {"ares_target_medium": target})
        assert result.values.tolist() == of([0.0, 0.0, 1.0, 1.0]).tolist()


def test_a_penalty_is_bounded():
    result = estimate([0.0, 0.0, 1.0, 1.0], {"ares_target_medium": 0.0}, penalty_limit=0.25)
    # 2 / 3 times 1 and 0.
    torch.testing.assert_close(result.values, of([0.0, -0.25, 1.0, 1.0]), rtol=1e-9, atol=1e-9)
    # Equal numbers of windows have no variance: only the limit bounds it.
    equal = torch.full((4, 4), 2.0)
    result = estimate(
        [0.0, 0.0, 1.0, 1.0], {"ares_target_medium": 1.0}, entropy=equal, epsilon=1e-6,
        quantile=0.0, threshold_decay=0.5, penalty_limit=0.25,
    )  # fmt: skip
    assert torch.isfinite(result.values).all()


def test_the_threshold_is_the_mean_of_quantiles_or_a_moving_one():
    assert estimate([1.0] * 4, {"ares_threshold": 5.0}).memory["ares_threshold"] == 1.0
    moving = estimate([1.0] * 4, {"ares_threshold": 5.0}, threshold_decay=0.75)
    assert moving.memory["ares_threshold"] == 4.0
    # No window exceeds 4.
    assert moving.statistics["ares_windows"] == 0.0
    empty = estimate([1.0] * 4, {"ares_threshold": 5.0}, mask=torch.zeros(4, 4).bool())
    assert empty.memory == {"ares_threshold": 5.0}


def test_windows_of_a_session_are_those_of_all_its_outputs():
    rollout = Rollout(
        torch.tensor([0.0, 0.0, 1.0, 0.0]), GROUP, torch.tensor([False, True, True, True]), MASK,
        extras={"entropy": ENTROPY.flip(0), "memory": {}}, final=torch.tensor([1, 1, 2, 3]),
    )  # fmt: skip
    result = shaped_advantages(rollout, ARESSettings(window=1, quantile=0.5))
    # The first session has outputs of 4 and 3 windows, the others 1 and 0.
    assert result.memory["ares_target_medium"] == pytest.approx(8 / 3)


# ---------------------------------------------------------------- weights of the KL term


def test_the_kl_weights_follow_difficulty_and_windows():
    changes = {"kl_easy": 3.0, "kl_medium": 2.0, "kl_hard": 0.5, "kl_window": 0.25}
    expected = torch.where(ENTROPY > 1, 0.25, 1.0).double()
    mask = MASK.clone()
    mask[0, 3] = False
    for rewards, factor in (([1.0, 1, 1, 0], 3.0), ([1.0, 1, 0, 0], 2.0), ([1.0, 0, 0, 0], 0.5)):
        field = estimate(rewards, mask=mask, **changes).token_fields[KL_WEIGHT]
        assert torch.equal(field, factor * expected * mask)


def objective(batch, settings):
    """The equation of the policy loss; `test_records` compares values and slopes with it."""
    ratio, (low, high) = batch.log_ratio.exp(), batch.clip_range
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)


# ---------------------------------------------------------------- settings


def test_defaults():
    assert ARESSettings() == ARESSettings(4, 0.95, 0.0, 0.9, 1e-6, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("name", "value", "permitted"),
    [
        ("window", 0, "must be an integer of at least 1"),
        ("window", 2.0, "must be an integer"),
        ("quantile", 1.1, "must be a number in [0, 1]"),
        ("threshold_decay", 1, "must be below 1, or nothing new counts"),
        ("target_decay", -0.1, "must be a number in [0, 1]"),
        ("epsilon", 0, "must be a number in (0, inf)"),
        ("penalty_limit", NAN, "must be a number in [0, inf)"),
        ("kl_hard", -1, "must be a number in [0, inf)"),
        ("kl_window", 1.5, "must be a number in [0, 1]"),
        ("success_reward", None, "must be a number in [-inf, inf), got NoneType"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(name, value, permitted):
    message = f"{PATH}.{name} = {value!r}: {permitted}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        ARESSettings(**{name: value})


def test_a_kl_penalty_in_the_rewards_is_refused():
    config = {"algorithm": {"adv_estimator": "ares", "use_kl_in_reward": True}}
    with pytest.raises(ConfigError, match=r"^algorithm\.use_kl_in_reward = True: adv_estimator"):
        ESTIMATORS["ares"].check(config)
