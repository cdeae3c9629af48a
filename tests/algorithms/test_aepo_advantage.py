import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_batches import token_batch

from hpo_verl.algorithms import aepo_advantage as module
from hpo_verl.algorithms.aepo_advantage import (
    AEPOAdvantageSettings,
    entropy_aware_advantages,
    standardized_entropy,
)
from hpo_verl.algorithms.base import Rollout
from hpo_verl.core.surrogate import clipped_surrogate
from hpo_verl.errors import ConfigError


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


def advantages_of(entropy, mask, scale=0.2):
    """Rewards 1 and 0: A = 0.5 and -0.5."""
    rollout = Rollout(
        torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([True, True]), mask, False,
        {"entropy": entropy},
    )  # fmt: skip
    return entropy_aware_advantages(rollout, AEPOAdvantageSettings(scale)).values


# Beyond 1 / z a weight is negative and turns the sign, as the equation says.
@pytest.mark.parametrize("scale", [0.0, 0.2, 2.0])
def test_hand_derived_advantages(scale):
    z = np.array([[-2, -1], [0, 3]]) / np.sqrt(14 / 3)
    expected = np.array([[0.5], [-0.5]]) * (1 + scale * z)
    result = advantages_of(*batch(), scale)
    np.testing.assert_allclose(result[:, :2], expected, rtol=1e-12)
    assert (result[:, 2] == 0).all()
    assert (result[0, 0] < 0) == (scale == 2.0)


@pytest.mark.parametrize("dead", [NAN, float("inf"), 1e30, -1.0])
def test_masked_entropies_change_nothing(dead):
    assert torch.equal(standardized_entropy(*batch(dead)), standardized_entropy(*batch(0.0)))


@pytest.mark.parametrize("live", [0, 1, 4])
def test_without_spread_the_advantages_stay_as_they_are(live):
    mask = (torch.arange(4) < live).expand(2, 4)
    entropy = torch.full((2, 4), 0.7)
    assert (standardized_entropy(entropy, mask) == 0).all()
    assert torch.equal(advantages_of(entropy, mask), torch.tensor([[0.5], [-0.5]]) * mask)


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


def objective(batch, settings):
    """The equation; `test_records` compares values and slopes with it."""
    ratio, (low, high) = batch.log_ratio.exp(), batch.clip_range
    above = (1 + high) * ratio / ratio.detach()
    clipped = torch.minimum(ratio.clamp(min=1 - low), above)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
