"""AHPO by hand: who is imitated, both advantages, and the paper's objective in float64."""

import math
import re

import pytest
import torch

from hpo_verl.algorithms.ahpo import (
    ALGORITHMS,
    IMITATED,
    HybridSettings,
    advantages_with_expert,
    hybrid_loss,
    openings,
)
from hpo_verl.algorithms.base import Opening, Rollout, TokenBatch
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.surrogate import attach, clipped_surrogate
from hpo_verl.errors import ConfigError

PATH = "algorithm.ahpo"

# Two prompts of four responses of two tokens; the first of each is the expert's.
REWARDS = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
OPENING = torch.tensor([0, -1, -1, -1, 0, -1, -1, -1])
MASK = torch.ones(8, 2, dtype=torch.bool)
# Of three responses with one success: 2 / sqrt(3), -1 / sqrt(3), times 8 / 6.
HIGH, LOW = 4 / 3 * 2 / math.sqrt(3), -4 / 3 / math.sqrt(3)


def estimate(rewards=REWARDS, opening=OPENING, mask=MASK, scores=None, **changes):
    rollout = Rollout(
        rewards, GROUPS, mask.any(dim=-1), mask, scores=scores, extras={"opening": opening}
    )
    return advantages_with_expert(rollout, HybridSettings(**changes))


# ---------------------------------------------------------------- advantages


def test_the_expert_is_imitated_where_no_response_succeeds():
    result = estimate(weight=0.5)
    expected = [0.0, HIGH, LOW, LOW, 0.5 * 8 / 2, 0.0, 0.0, 0.0]
    assert result.values.tolist() == pytest.approx(expected, rel=1e-5)
    # An expert's answer is no success of the policy.
    assert (result.positives, result.negatives) == (1, 2)
    assert result.statistics == {
        "ahpo_success": pytest.approx(1 / 6),
        "ahpo_expert_fraction": 1.0,
        "ahpo_imitated_fraction": 0.5,
    }
    assert result.token_fields[IMITATED].tolist() == [[row, row] for row in (1, 0, 0, 0) * 2]


@pytest.mark.parametrize(("successes", "expected"), [(0, [0.0, 0.0]), (1, [0.0, 4.0]),
                                                     (2, [4.0, 4.0])])  # fmt: skip
def test_fewer_than_r_successes_count_the_policys_own_alone(successes, expected):
    # The expert's own reward of 1 is no success of the policy.
    assert estimate(successes=successes).values[[0, 4]].tolist() == expected


def test_what_counts_as_a_success():
    partial = torch.where(REWARDS > 0, 0.6, 0.1)
    assert estimate(partial).values[[0, 4]].tolist() == [4.0, 4.0]
    assert estimate(partial, success_reward=0.5).values[[0, 4]].tolist() == [0.0, 4.0]
    # With a KL penalty in the rewards, the scores tell.
    penalized = estimate(REWARDS - 0.01, scores=REWARDS)
    assert penalized.values[[0, 4]].tolist() == [0.0, 4.0]


def test_a_prompt_without_an_experts_answer_is_grpos():
    opening = torch.tensor([0, -1, -1, -1, -1, -1, -1, -1])
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    result = estimate(rewards, opening)
    # Seven of the policy's; the second group has four of them, one success: 1.5 and -0.5.
    expected = [4.0, 0.0, 0.0, 0.0, 8 / 7 * 1.5, *[-8 / 7 * 0.5] * 3]
    assert result.values.tolist() == pytest.approx(expected, rel=1e-5)
    assert result.statistics["ahpo_expert_fraction"] == 0.5


def test_rows_that_are_not_live_count_for_nothing():
    mask = MASK.clone()
    mask[4] = mask[5] = False
    result = estimate(mask=mask)
    # Six live rows, five of the policy's; the second prompt's expert is none of them.
    scale = 6 / 5 * 3 / 4
    expected = [0.0, scale * HIGH, scale * LOW, scale * LOW, 0.0, 0.0, 0.0, 0.0]
    assert result.values.tolist() == pytest.approx(expected, rel=1e-5)
    assert result.token_fields[IMITATED][4].tolist() == [0.0, 0.0]
    empty = estimate(mask=torch.zeros_like(MASK))
    assert (empty.values == 0).all()


def test_openings_are_the_experts_answer():
    assert openings(HybridSettings(by="solution")) == [Opening("", "solution")]


# ---------------------------------------------------------------- loss


def objective(batch, settings):
    """The equation, by autograd: PPO's clip, and -A log pi of the expert's tokens."""
    ratio, advantages = batch.log_ratio.exp(), batch.advantages
    clipped = ratio.clamp(1 - batch.clip_range[0], 1 + batch.clip_range[1])
    own = -torch.minimum(ratio * advantages, clipped * advantages)
    expert = (batch.extras[IMITATED] > 0) & (advantages > 0)
    return torch.where(expert, -advantages * (batch.old_log_prob + batch.log_ratio), own)


def test_both_losses_by_hand():
    # log pi = -2 + 0.5; a ratio of 1.65 is clipped at 1.2, and does not stop the expert's token.
    ones = torch.ones(1, 2, dtype=torch.float64)
    batch = TokenBatch(
        0.5 * ones, 3 * ones, ones.bool(), -2 * ones, (0.2, 0.2),
        {IMITATED: torch.tensor([[0.0, 1.0]])},
    )  # fmt: skip
    loss = hybrid_loss(batch, None)
    assert loss.values.tolist() == [[pytest.approx(-3.6), pytest.approx(4.5)]]
    assert loss.slopes.tolist() == [[0.0, -3.0]]


def test_the_mean_over_the_batch_is_the_papers_objective_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    log_ratio = 0.3 * torch.randn(8, 2, generator=generator, dtype=torch.float64)
    old = -torch.rand(8, 2, generator=generator, dtype=torch.float64)
    mask = MASK.clone()
    mask[4, 1] = mask[1, 1] = False
    weight, lengths = 0.3, mask.sum(dim=-1)
    result = estimate(mask=mask, weight=weight)
    advantages = result.values.unsqueeze(-1) * mask
    leaf = log_ratio.clone().requires_grad_()
    batch = TokenBatch(log_ratio, advantages, mask, old, (0.2, 0.2), result.token_fields)
    ours = ((attach(leaf, hybrid_loss(batch, None)) * mask).sum(-1) / lengths).mean()

    plain = log_ratio.clone().requires_grad_()
    own = OPENING < 0
    grpo = group_relative_advantages(REWARDS, GROUPS, own).advantages.unsqueeze(-1)
    ratio = plain.exp()
    surrogate = torch.minimum(ratio * grpo, ratio.clamp(0.8, 1.2) * grpo)
    of_policy = -((surrogate * mask).sum(-1) / lengths)[own]
    nll = -((old + plain) * mask).sum(-1) / lengths
    theirs = of_policy.mean() + weight * (0.0 * nll[0] + 1.0 * nll[4]) / 2
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-9, atol=0)
    (gradient,), (expected,) = (
        torch.autograd.grad(value, x) for value, x in ((ours, leaf), (theirs, plain))
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_without_an_expert_the_loss_is_ppos():
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2)
    advantages = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]]).double().expand(4, 2)
    fields = {IMITATED: torch.zeros(4, 2)}
    batch = TokenBatch(x, advantages, torch.ones(4, 2).bool(), x - 1, (0.2, 0.2), fields)
    plain = clipped_surrogate(x, advantages, 0.2, 0.2)
    torch.testing.assert_close(hybrid_loss(batch, None), plain, rtol=0, atol=0)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value", "permitted"),
    [
        ("by", "", "must be a text"),
        ("by", 3, "must be a text"),
        ("successes", -1, "must be an integer of at least 0"),
        ("successes", 0.5, "must be an integer of at least 0"),
        ("weight", float("nan"), "must be a number in [0, inf)"),
        ("success_reward", "1", "must be a number in [-inf, inf), got str"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(name, value, permitted):
    message = f"{PATH}.{name} = {value!r}: {permitted}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        HybridSettings(**{name: value})


@pytest.mark.parametrize(("n", "refused"), [(1, False), (2, True), (3, False)])
def test_two_responses_must_remain_to_be_compared(n, refused):
    check = ALGORITHMS[0].estimator.check
    config = {"actor_rollout_ref": {"rollout": {"n": n}}}
    if refused:
        with pytest.raises(ConfigError, match=r"^actor_rollout_ref.rollout.n = 2: .*at least 3$"):
            check(config)
    else:
        check(config)
