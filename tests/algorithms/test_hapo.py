import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_batches import token_batch

from hpo_verl.algorithms import hapo as module
from hpo_verl.algorithms.base import Rollout
from hpo_verl.algorithms.hapo import (
    SMALLEST_ENTROPY,
    HAPOAdvantageSettings,
    HAPOSettings,
    entropy_deviation,
    token_group_advantages,
)
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.surrogate import attach, clipped_surrogate
from hpo_verl.errors import ConfigError


def hapo_loss(log_ratio, advantages, deviation, low, high, settings):
    batch = token_batch(log_ratio, advantages, (low, high), entropy_deviation=deviation)
    return module.hapo_loss(batch, settings)


NAN = float("nan")
PATH = "actor_rollout_ref.actor.policy_loss"

# ---------------------------------------------------------------- advantage


def advantages_of(rewards, lengths, codes, limit=5.0, normalize_by_std=True):
    mask = torch.arange(max([0, *lengths])) < torch.tensor(lengths).view(-1, 1)
    rollout = Rollout(
        torch.tensor(rewards), torch.tensor(codes).long(), mask.any(dim=-1), mask, normalize_by_std
    )
    return token_group_advantages(rollout, HAPOAdvantageSettings(limit)).values


def test_hand_derived_group_average_over_tokens():
    # Four tokens of reward 1, twelve of 0: mean 1/4, deviation sqrt(3)/4.
    result = advantages_of([1.0, 0.0, 0.0], [4, 2, 10], [0, 0, 0])
    np.testing.assert_allclose(result, [math.sqrt(3), *[-1 / math.sqrt(3)] * 2], rtol=1e-5)
    plain = advantages_of([1.0, 0.0, 0.0], [4, 2, 10], [0, 0, 0], normalize_by_std=False)
    assert plain.tolist() == [0.75, -0.25, -0.25]


def test_a_group_beyond_the_limit_gets_grpos_advantages():
    # 2 tokens of 54 with reward 1: (1 - p) / sqrt(p (1 - p)) = sqrt(26) = 5.1.
    batch = ([1.0, 0.0, 1.0, 0.0], [2, 52, 1, 1], [0, 0, 1, 1])
    result = advantages_of(*batch)
    np.testing.assert_allclose(result, [0.5**0.5, -(0.5**0.5), 1, -1], rtol=1e-5)
    higher = advantages_of(*batch, limit=5.2)
    np.testing.assert_allclose(higher, [26**0.5, -(26**-0.5), 1, -1], rtol=1e-4)


def test_the_limit_itself_is_beyond():
    # Mean 1 over the 26 tokens, 13 over the two responses.
    batch = ([26.0, 0.0], [1, 25], [0, 0])
    assert advantages_of(*batch, limit=25.0, normalize_by_std=False)[0] == 13.0
    assert advantages_of(*batch, limit=25.001, normalize_by_std=False)[0] == 25.0


@pytest.mark.parametrize("reward", [0.0, 0.7, -0.3])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(reward):
    assert (advantages_of([reward] * 7 + [1.0], [3, 1, 4, 1, 5, 9, 2, 6], [0] * 7 + [1]) == 0).all()


def test_responses_without_a_token_count_for_nothing():
    alone = advantages_of([1.0, 0.0, 0.0], [4, 2, 10], [0, 0, 0])
    result = advantages_of([1.0, 0.0, 0.0, 9.0, NAN], [4, 2, 10, 0, 0], [0, 0, 0, 0, 1])
    assert torch.equal(result[:3], alone)
    assert result[3:].tolist() == [0.0, 0.0]


def test_equal_lengths_are_grpo_with_the_populations_deviation():
    rewards, codes = [1.0, 0.0, 0.0, 0.5], [0, 0, 0, 0]
    grpo = group_relative_advantages(
        torch.tensor(rewards), torch.tensor(codes), torch.ones(4).bool()
    )
    result = advantages_of(rewards, [3] * 4, codes)
    np.testing.assert_allclose(result, grpo.advantages * math.sqrt(4 / 3), rtol=1e-5)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 0.3]), st.integers(0, 20), st.integers(0, 3)),
        min_size=1, max_size=24,
    )
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_advantages_sum_to_zero_over_the_tokens_of_a_group(rows):
    rewards, lengths, codes = map(list, zip(*rows, strict=True))
    result = advantages_of(rewards, lengths, codes, limit=1e9)
    total = torch.zeros(4, dtype=torch.float64)
    total.index_add_(0, torch.tensor(codes), result * torch.tensor(lengths))
    assert total.abs().max() < 1e-6


def test_an_empty_batch():
    assert advantages_of([], [], []).shape == (0,)


# ---------------------------------------------------------------- entropy


def deviation_of(entropy, mask=None, **changes):
    entropy = torch.tensor([entropy])
    mask = torch.ones_like(entropy) if mask is None else torch.tensor([mask])
    return entropy_deviation(entropy, mask.bool(), HAPOSettings(**changes)).squeeze(0)


E = math.e


def test_hand_derived_deviation_of_the_papers_text():
    # Logarithms -2, -1, 0, 1, 3; the third of five is the median.
    entropy = [E**-2, E**-1, 1.0, E, E**3]
    expected = [-1.0, -0.5, 0.0, 1 / 3, 1.0]
    np.testing.assert_allclose(deviation_of(entropy, entropy_pivot=0.5), expected, atol=1e-6)
    # Rank 1 + round(0.8 * 4) = 4: the pivot is 1.
    expected = [-1.0, -2 / 3, -1 / 3, 0.0, 1.0]
    np.testing.assert_allclose(deviation_of(entropy), expected, atol=1e-6)


def test_the_public_codes_sign_is_never_negative():
    entropy = [E**-2, E**-1, 1.0, E, E**3]
    result = deviation_of(entropy, entropy_pivot=0.5, repo_compatible=True)
    np.testing.assert_allclose(result, [1.0, 0.5, 0.0, 1 / 3, 1.0], atol=1e-6)


@pytest.mark.parametrize(("pivot", "sign"), [(0.0, 1.0), (1.0, -1.0)])
def test_the_extremes_leave_one_side_empty(pivot, sign):
    result = deviation_of([1.0, E, E**2], entropy_pivot=pivot)
    assert sorted((sign * result).tolist()) == pytest.approx([0.0, 0.5, 1.0])


def test_all_equal_or_nothing_live_gives_zero():
    assert deviation_of([0.7] * 4).tolist() == [0.0] * 4
    assert deviation_of([0.7, 0.2], mask=[0, 0]).tolist() == [0.0] * 2
    assert deviation_of([0.7, 0.2], mask=[1, 0]).tolist() == [0.0] * 2


def test_an_entropy_of_zero_or_below_counts_as_the_smallest():
    low = deviation_of([0.0, -1e-7, 1.0, E, E], entropy_pivot=0.5)
    floor = deviation_of([SMALLEST_ENTROPY, SMALLEST_ENTROPY, 1.0, E, E], entropy_pivot=0.5)
    assert torch.equal(low, floor)
    assert low[0] == -1


@pytest.mark.parametrize("dead", [NAN, float("inf"), -1.0, 1e30])
def test_masked_entropies_change_nothing(dead):
    clean = deviation_of([1.0, E, E**2, 1.0], mask=[1, 1, 1, 0])
    assert torch.equal(deviation_of([1.0, E, E**2, dead], mask=[1, 1, 1, 0]), clean)
    assert clean[3] == 0


@given(st.lists(st.floats(0, 12), min_size=1, max_size=40), st.floats(0, 1), st.booleans())
@settings(max_examples=80, deadline=None)
def test_it_stays_between_minus_one_and_one_and_agrees_with_the_paper(entropy, pivot, repo):
    result = deviation_of(entropy, entropy_pivot=pivot, repo_compatible=repo).numpy()
    assert (np.abs(result) <= 1 + 1e-6).all()
    # As printed, with the standard deviation that cancels.
    logs = np.log(np.maximum(np.array(entropy, dtype=np.float32), np.float32(1e-8)))
    distance = logs - np.sort(logs)[round(pivot * (len(logs) - 1))]
    if np.abs(distance).max() == 0:
        assert (result == 0).all()
        return
    h = distance / np.sqrt((distance**2).mean())
    above, below = max(h.max(), 1e-30), max(-h.min(), 1e-30)
    expected = np.where(h > 0, h / above, np.where(repo, -1, 1) * h / below)
    np.testing.assert_allclose(result, expected, atol=1e-4)


# ---------------------------------------------------------------- loss

LOW, HIGH = 0.2, 0.28


def loss_of(ratios, advantages, deviation, **changes):
    return hapo_loss(
        torch.tensor(ratios, dtype=torch.float64).log(),
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(deviation, dtype=torch.float64),
        LOW, HIGH, HAPOSettings(**changes),
    )  # fmt: skip


def test_every_branch_of_the_redistribution_by_hand():
    # h > 0 and outside [0.9, 1.14]; inside; h <= 0 and inside; outside; h = 0 inside.
    loss = loss_of([1.2, 1.0, 1.0, 0.85, 1.0], [2.0] * 5, [0.5, 0.5, -0.5, -0.5, 0.0])
    values = [-1.2 * 3.0, -2.0, -1.0, -0.85 * 2.0, -2.0]
    np.testing.assert_allclose(loss.values, values, rtol=1e-12)
    np.testing.assert_allclose(loss.slopes, values, rtol=1e-12)


def test_every_branch_of_the_clip_by_hand():
    # e_high' = 0.28 * 1.5 = 0.42 at h = 0.5; e_low' = 0.2 * 1.5 = 0.3 at h = -0.5; else 0.2, 0.28.
    loss = loss_of(
        [1.41, 1.43, 1.30, 0.71, 0.69, 0.79],
        [1.0, 1.0, 1.0, -1.0, -1.0, -1.0],
        [0.5, 0.5, -0.5, -0.5, -0.5, 0.5],
        adv_beta=0.0,
    )
    np.testing.assert_allclose(loss.values, [-1.41, -1.42, -1.28, 0.71, 0.7, 0.8], rtol=1e-12)
    np.testing.assert_allclose(loss.slopes, [-1.41, 0, 0, 0.71, 0, 0], rtol=1e-12)


def test_the_text_widens_the_left_bound_at_low_entropy_and_the_repository_the_right():
    entropy = torch.tensor([[E**-2, 1.0, E]], dtype=torch.float64)
    mask = torch.ones(1, 3).bool()
    for repo, low, high in ((False, 0.6, 1.28), (True, 0.8, 1.56)):
        options = HAPOSettings(entropy_pivot=0.5, repo_compatible=repo)
        deviation = entropy_deviation(entropy, mask, options)[:, :1].double()
        far = torch.tensor([[3.0]], dtype=torch.float64).log()
        one = torch.ones(1, 1, dtype=torch.float64)
        weight = 2.0 if repo else 1.0
        below = hapo_loss(-far, -one, deviation, LOW, HIGH, options)
        above = hapo_loss(far, one, deviation, LOW, HIGH, options)
        assert below.values.item() == pytest.approx(low * weight)
        assert above.values.item() == pytest.approx(-high * weight)


def test_the_neutral_zone_of_the_repository_follows_the_adapted_bounds():
    # At h = 1: [0.9, 1.14] by the paper, [0.9, 1.28] by the public code.
    assert loss_of([1.2], [1.0], [1.0]).values.item() == pytest.approx(-2.4)
    assert loss_of([1.2], [1.0], [1.0], repo_compatible=True).values.item() == pytest.approx(-1.2)


def random_batch():
    generator = torch.Generator().manual_seed(5)
    log_ratio, advantages = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64)
    deviation = 2 * torch.rand(8, 16, generator=generator, dtype=torch.float64) - 1
    return log_ratio / 3, advantages, deviation


@pytest.mark.parametrize("changes", [{}, {"adv_beta": 0.3}, {"clip_alpha": 0.4}])
def test_agrees_with_the_equation(changes):
    log_ratio, advantages, h = (tensor.numpy() for tensor in random_batch())
    beta, alpha = changes.get("adv_beta", 1.0), changes.get("clip_alpha", 1.0)
    ratio = np.exp(log_ratio)
    inside = (ratio >= 1 - LOW / 2) & (ratio <= 1 + HIGH / 2)
    weighted = np.where((h > 0) == inside, advantages, advantages * (1 + beta * h))
    low = np.where(h <= 0, LOW * (1 - alpha * h), LOW)
    high = np.where(h > 0, HIGH * (1 + alpha * h), HIGH)
    expected = -np.minimum(ratio * weighted, np.clip(ratio, 1 - low, 1 + high) * weighted)
    loss = hapo_loss(*random_batch(), LOW, HIGH, HAPOSettings(**changes))
    np.testing.assert_allclose(loss.values, expected, rtol=1e-10)


def test_without_entropy_or_with_both_scales_zero_it_is_the_clipped_surrogate():
    log_ratio, advantages, deviation = random_batch()
    plain = clipped_surrogate(log_ratio, advantages, LOW, HIGH)
    off = HAPOSettings(adv_beta=0.0, clip_alpha=0.0)
    for result in (
        hapo_loss(log_ratio, advantages, torch.zeros_like(deviation), LOW, HIGH, HAPOSettings()),
        hapo_loss(log_ratio, advantages, deviation, LOW, HIGH, off),
    ):
        assert torch.equal(result.values, plain.values)
        assert torch.equal(result.slopes, plain.slopes)


@pytest.mark.parametrize("repo", [False, True])
def test_the_slope_is_the_derivative(repo):
    log_ratio, advantages, deviation = random_batch()
    options = HAPOSettings(repo_compatible=repo)

    def function(x):
        return attach(x, hapo_loss(x.detach(), advantages, deviation, LOW, HIGH, options))

    # Where the neutral zone ends the loss jumps; none of these ratios is that near to it.
    assert torch.autograd.gradcheck(function, (log_ratio.clone().requires_grad_(),))


# ---------------------------------------------------------------- settings


def test_defaults_are_the_papers():
    assert HAPOSettings() == HAPOSettings(0.8, 1.0, 1.0, False)
    assert HAPOAdvantageSettings() == HAPOAdvantageSettings(5.0)


@pytest.mark.parametrize("name", ["entropy_pivot", "adv_beta", "clip_alpha"])
@pytest.mark.parametrize("value", [-0.01, 1.01, NAN, "0.5", None, True])
def test_settings_out_of_range_are_refused_by_their_path(name, value):
    message = f"{PATH}.{name} = {value!r}: must be a number in [0, 1]"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        HAPOSettings(**{name: value})


def test_the_other_settings_too():
    with pytest.raises(ConfigError, match=rf"^{re.escape(PATH)}\.repo_compatible = 'yes': must be"):
        HAPOSettings(repo_compatible="yes")
    with pytest.raises(ConfigError, match=r"^algorithm\.hapo\.advantage_limit = 0: must be a"):
        HAPOAdvantageSettings(0)


def objective(batch, settings):
    """The equation; `test_records` compares values and slopes with it."""
    ratio, (low, high), h = (
        batch.log_ratio.exp(),
        batch.clip_range,
        batch.extras["entropy_deviation"],
    )
    neutral = (ratio >= 1 - low / 2) & (ratio <= 1 + high / 2)
    moved = torch.where(h > 0, ~neutral, neutral)
    advantages = batch.advantages * torch.where(moved, 1 + settings.adv_beta * h, 1)
    low = low * (1 - settings.clip_alpha * h.clamp(max=0))
    high = high * (1 + settings.clip_alpha * h.clamp(min=0))
    clipped = torch.minimum(torch.maximum(ratio, 1 - low), 1 + high)
    return -torch.minimum(ratio * advantages, clipped * advantages)
