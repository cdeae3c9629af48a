import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_verl.algorithms import aepo_advantage as module
from hpo_verl.algorithms.aepo_advantage import (
    AEPOAdvantageSettings,
    entropy_aware_advantages,
    standardized_entropy,
)
from hpo_verl.algorithms.base import TokenBatch
from hpo_verl.core.clipping import clipped_surrogate
from hpo_verl.core.surrogate import attach
from hpo_verl.errors import ConfigError


def token_batch(log_ratio, advantages, clip_range=(0.0, 0.0), **extras):
    mask = torch.ones_like(log_ratio, dtype=torch.bool)
    return TokenBatch(log_ratio, advantages, mask, torch.zeros_like(log_ratio), clip_range, extras)


def aepo_clip_loss(log_ratio, advantages, low, high):
    return module.aepo_clip_loss(token_batch(log_ratio, advantages, (low, high)), None)


NAN = float("nan")


def batch(dead=NAN):
    """Live entropies 1, 2, 3, 6: mean 3, unbiased variance 14 / 3."""
    entropy = torch.tensor([[1.0, 2.0, dead], [3.0, 6.0, dead]], dtype=torch.float64)
    return entropy, torch.tensor([[True, True, False], [True, True, False]])


def test_hand_derived_scores():
    std = np.sqrt(14 / 3)
    expected = np.array([[-2, -1, 0], [0, 3, 0]]) / std
    np.testing.assert_allclose(standardized_entropy(*batch()), expected, rtol=1e-12)


def test_hand_derived_advantages():
    entropy, mask = batch()
    advantages = torch.tensor([1.5, -0.5], dtype=torch.float64)
    result = entropy_aware_advantages(advantages, entropy, mask, AEPOAdvantageSettings())
    z = np.array([[-2, -1], [0, 3]]) / np.sqrt(14 / 3)
    expected = np.array([[1.5], [-0.5]]) * (1 + 0.2 * z)
    np.testing.assert_allclose(result[:, :2], expected, rtol=1e-12)
    assert (result[:, 2] == 0).all()


def test_a_weight_below_zero_turns_the_sign_as_the_equation_says():
    entropy, mask = batch()
    result = entropy_aware_advantages(torch.ones(2), entropy, mask, AEPOAdvantageSettings(2.0))
    assert result[0, 0] == pytest.approx(1 - 4 / np.sqrt(14 / 3))
    assert result[0, 0] < 0


@pytest.mark.parametrize("dead", [NAN, float("inf"), 1e30, -1.0])
def test_masked_entropies_change_nothing(dead):
    assert torch.equal(standardized_entropy(*batch(dead)), standardized_entropy(*batch(0.0)))


@pytest.mark.parametrize("live", [0, 1, 4])
def test_without_spread_the_advantages_stay_as_they_are(live):
    mask = (torch.arange(4) < live).unsqueeze(0)
    entropy = torch.full((1, 4), 0.7)
    assert (standardized_entropy(entropy, mask) == 0).all()
    result = entropy_aware_advantages(torch.tensor([2.0]), entropy, mask, AEPOAdvantageSettings())
    assert result.tolist() == [[2.0] * live + [0.0] * (4 - live)]


def test_scale_zero_is_the_plain_advantage():
    entropy, mask = batch()
    advantages = torch.tensor([1.5, -0.5])
    result = entropy_aware_advantages(advantages, entropy, mask, AEPOAdvantageSettings(0.0))
    assert torch.equal(result, advantages.double().unsqueeze(-1) * mask)


def test_scores_have_mean_zero_and_deviation_one_and_ignore_the_unit():
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(16, 32, generator=generator, dtype=torch.float64)
    mask = torch.rand(16, 32, generator=generator) < 0.7
    scores = standardized_entropy(entropy, mask)
    assert scores[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert scores[mask].std().item() == pytest.approx(1)
    torch.testing.assert_close(standardized_entropy(3 * entropy + 5, mask), scores)
    order = torch.randperm(16, generator=generator)
    torch.testing.assert_close(standardized_entropy(entropy[order], mask[order]), scores[order])


def test_no_gradient_flows():
    entropy, mask = batch()
    advantages = torch.ones(2, requires_grad=True)
    result = entropy_aware_advantages(
        advantages, entropy.requires_grad_(), mask, AEPOAdvantageSettings()
    )
    assert not result.requires_grad


@pytest.mark.parametrize("value", [-0.1, NAN, float("inf"), "0.2", None, True])
def test_a_scale_out_of_range_is_refused_by_its_path(value):
    message = f"algorithm.aepo_advantage.entropy_scale = {value!r}: must be a number in [0, inf)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        AEPOAdvantageSettings(value)


def test_the_default_is_that_of_the_public_code():
    assert AEPOAdvantageSettings() == AEPOAdvantageSettings(entropy_scale=0.2)


# ---------------------------------------------------------------- the loss

RATIOS = [0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 2.0]


def loss_of(ratios, advantage):
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    return aepo_clip_loss(log_ratio, torch.full_like(log_ratio, advantage), 0.2, 0.3)


def test_every_branch_with_hand_derived_numbers():
    positive = loss_of(RATIOS, 2.0)
    values = [-1.0, -1.58, -1.62, -2.0, -2.58, -2.6, -2.6]
    np.testing.assert_allclose(positive.values, values, rtol=1e-12)
    # Above 1.3 the weight stays 1.3, where PPO's is 0.
    np.testing.assert_allclose(positive.slopes, values, rtol=1e-12)
    negative = loss_of(RATIOS, -2.0)
    np.testing.assert_allclose(negative.values, [1.6, 1.6, 1.62, 2.0, 2.58, 2.62, 4.0], rtol=1e-12)
    np.testing.assert_allclose(negative.slopes, [0, 0, 1.62, 2.0, 2.58, 2.62, 4.0], rtol=1e-12)
    zero = loss_of(RATIOS, 0.0)
    assert (zero.values == 0).all()
    assert (zero.slopes == 0).all()


def random_batch(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 16, 32, generator=generator, dtype=torch.float64)


def test_the_slope_is_the_derivative_of_the_equation_with_its_stopped_gradient():
    log_ratio, advantages = random_batch()
    log_prob = log_ratio.clone().requires_grad_()
    ratio = log_prob.exp()
    upper = (1 + 0.3) * ratio / ratio.detach()
    clipped = torch.minimum(torch.maximum(ratio, torch.tensor(0.8)), upper)
    plain = -torch.minimum(ratio * advantages, clipped * advantages)
    (expected,) = torch.autograd.grad(plain.sum(), log_prob)
    loss = aepo_clip_loss(log_ratio, advantages, 0.2, 0.3)
    losses = attach(log_prob, loss)
    (actual,) = torch.autograd.grad(losses.sum(), log_prob)
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(actual, expected)


def test_gradcheck_where_no_gradient_is_kept_beyond_the_clip():
    log_ratio, advantages = random_batch()
    log_ratio = log_ratio.clamp(max=0.26)

    def function(x):
        return attach(x, aepo_clip_loss(x.detach(), advantages, 0.2, 0.3))

    assert torch.autograd.gradcheck(function, (log_ratio.requires_grad_(),))


@given(st.floats(-20, 20), st.floats(-4, 4))
@settings(max_examples=100, deadline=None)
def test_it_differs_from_the_clipped_surrogate_above_the_clip_only(log_ratio, advantage):
    log_ratio = torch.tensor([log_ratio], dtype=torch.float64)
    advantage = torch.tensor([advantage], dtype=torch.float64)
    ours = aepo_clip_loss(log_ratio, advantage, 0.2, 0.3)
    ppo = clipped_surrogate(log_ratio, advantage, 0.2, 0.3)
    assert torch.equal(ours.values, ppo.values)
    if advantage > 0 and log_ratio.exp() > 1.3:
        assert ppo.slopes == 0
        assert ours.slopes.item() == pytest.approx(-1.3 * advantage.item())
    else:
        assert torch.equal(ours.slopes, ppo.slopes)


def test_the_arguments_are_not_changed():
    log_ratio, advantages = torch.full((3,), 0.5), torch.tensor([1.0, -1.0, 0.0])
    aepo_clip_loss(log_ratio, advantages, 0.2, 0.2)
    assert log_ratio.tolist() == [0.5] * 3
    assert advantages.tolist() == [1.0, -1.0, 0.0]


def objective(batch, settings):
    """The equation; `test_records` compares values and slopes with it."""
    ratio, (low, high) = batch.log_ratio.exp(), batch.clip_range
    above = (1 + high) * ratio / ratio.detach()
    clipped = torch.minimum(ratio.clamp(min=1 - low), above)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
