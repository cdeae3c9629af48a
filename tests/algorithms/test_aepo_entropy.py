"""Arbitrary entropy by hand: the temperature, the two kinds of advantage, and the objective."""

import math
import re

import pytest
import torch

from hpo_verl.algorithms.aepo_entropy import (
    MEASURED,
    AEPOEntropySettings,
    advantages_with_successes,
    temperatures,
)
from hpo_verl.algorithms.base import Rollout
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.surrogate import attach, clipped_surrogate
from hpo_verl.errors import ConfigError

NAN = float("nan")
PATH = "algorithm.aepo_entropy"

# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize(
    ("measured", "linear", "switch"),
    [
        (0.5, 1.0, 1.2),
        (0.4, 1.1, 1.2),
        (0.65, 0.85, 0.8),
        (0.0, 1.2, 1.2),
        (3.0, 0.8, 0.8),
    ],
)
def test_the_temperature_after_a_measure_by_hand(measured, linear, switch):
    memory = {MEASURED: measured}
    assert AEPOEntropySettings().temperature(memory) == pytest.approx(linear)
    assert AEPOEntropySettings(schedule="switch").temperature(memory) == switch


def test_the_first_step_samples_at_one_and_so_do_all_other_responses():
    assert temperatures({}, AEPOEntropySettings()) == [1.0]
    settings = AEPOEntropySettings(responses=3, target=1.0, temperature_high=1.5)
    assert temperatures({MEASURED: 0.6}, settings) == pytest.approx([1.4] * 3)


# ---------------------------------------------------------------- advantages

# Two prompts of four responses of two tokens; the first of each is sampled at T.
REWARDS = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
SESSION = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
MASK = torch.ones(8, 2, dtype=torch.bool)
ENTROPY = torch.arange(16.0).view(8, 2)


def estimate(memory=None, session=SESSION, rewards=REWARDS, mask=MASK, scores=None, **changes):
    rollout = Rollout(
        rewards, GROUPS, mask.any(dim=-1), mask, scores=scores, session=session,
        extras={"entropy": ENTROPY, "memory": memory or {}},
    )  # fmt: skip
    return advantages_with_successes(rollout, AEPOEntropySettings(**changes))


def test_both_kinds_of_advantage_by_hand():
    result = estimate({MEASURED: 0.4}, weight=0.25)
    # Of three responses with one success: 2 / sqrt(3), -1 / sqrt(3), times 8 / 6.
    high, low = 4 / 3 * 2 / math.sqrt(3), -4 / 3 / math.sqrt(3)
    expected = [0.25 * 8 / 2, high, low, low, 0.0, low, low, high]
    assert result.values.tolist() == pytest.approx(expected, rel=1e-5)
    assert result.statistics == {
        "aepo_temperature": pytest.approx(1.1),
        "aepo_tempered_success": 0.5,
    }


def test_the_entropy_is_measured_on_the_responses_sampled_at_one():
    mask = MASK.clone()
    mask[7] = False
    # Rows 1 to 3, 5 and 6 hold 2..7 and 10..13.
    assert estimate(mask=mask).memory == {MEASURED: (27 + 46) / 10}
    nothing = torch.zeros_like(mask)
    assert estimate({MEASURED: 0.3}, mask=nothing).memory == {}


def test_what_counts_as_a_success():
    partial = torch.where(REWARDS > 0, 0.6, 0.1)
    assert estimate(rewards=partial).values[[0, 4]].tolist() == [0.0, 0.0]
    values = estimate(rewards=partial, success_reward=0.5, weight=0.25).values
    assert values[[0, 4]].tolist() == [1.0, 0.0]
    # With a KL penalty in the rewards, the scores tell.
    penalized = estimate(rewards=REWARDS - 0.01, scores=REWARDS, weight=0.25).values
    assert penalized[[0, 4]].tolist() == [1.0, 0.0]


def test_several_responses_at_the_temperature():
    values = estimate(responses=2, weight=0.5).values
    # Four of eight: 0.5 * 2; of the others every pair of the first group is equal.
    assert values[[0, 1, 4, 5]].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert values[[2, 3]].tolist() == [0.0, 0.0]
    assert values[[6, 7]].tolist() == pytest.approx([-(2**0.5), 2**0.5], rel=1e-5)


def test_where_sessions_are_not_known_it_is_grpo():
    result = estimate(session=None)
    grpo = group_relative_advantages(REWARDS, GROUPS, torch.ones(8).bool())
    assert torch.equal(result.values, grpo.advantages)
    assert result.memory == {MEASURED: 7.5}


def test_the_mean_over_the_batch_is_the_papers_objective_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    log_ratio = 0.3 * torch.randn(8, 2, generator=generator, dtype=torch.float64)
    mask = MASK.clone()
    mask[0, 1] = mask[5, 1] = False
    alpha, lengths = 0.3, mask.sum(dim=-1)
    advantages = estimate(mask=mask, weight=alpha).values.unsqueeze(-1) * mask
    leaf = log_ratio.clone().requires_grad_()
    loss = clipped_surrogate(log_ratio, advantages, 0.2, 0.2)
    ours = -((attach(leaf, loss) * mask).sum(dim=-1) / lengths).mean()

    plain = log_ratio.clone().requires_grad_()
    ratio = plain.exp()
    tempered = SESSION == 0
    grpo = group_relative_advantages(REWARDS, GROUPS, ~tempered).advantages.unsqueeze(-1)
    clipped = ratio.clamp(0.8, 1.2)
    of_group = ((torch.minimum(ratio * grpo, clipped * grpo) * mask).sum(-1) / lengths)[~tempered]
    success = (torch.minimum(ratio, clipped) * mask).sum(-1) / lengths * (REWARDS == 1)
    theirs = of_group.mean() + alpha * success[tempered].mean()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-9, atol=0)
    (gradient,), (expected,) = (
        torch.autograd.grad(value, x) for value, x in ((ours, leaf), (theirs, plain))
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- settings


def test_defaults_are_those_of_the_papers_latest_version():
    assert AEPOEntropySettings() == AEPOEntropySettings(0.5, 1, 1 / 64, "linear", 0.8, 1.2, 1.0)


@pytest.mark.parametrize(
    ("name", "value", "permitted"),
    [
        ("target", -0.1, "must be a number in [0, inf)"),
        ("responses", 0, "must be an integer of at least 1"),
        ("responses", 1.5, "must be an integer"),
        ("weight", NAN, "must be a number in [0, inf)"),
        ("schedule", "clip", "must be one of linear, switch"),
        ("temperature_low", 0.0, "must be a number in (0, 1]"),
        ("temperature_high", 0.9, "must be a number in [1, inf)"),
        ("success_reward", "1", "must be a number in [-inf, inf), got str"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(name, value, permitted):
    message = f"{PATH}.{name} = {value!r}: {permitted}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        AEPOEntropySettings(**{name: value})
