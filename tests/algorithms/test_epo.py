"""EPO by hand: the history of entropies, the weight's schedule, and the corridor's penalty."""

import math
import re

import pytest
import torch
from token_batches import token_batch

from hpo_verl.algorithms.base import Rollout, clipped_loss
from hpo_verl.algorithms.epo import (
    HISTORY,
    SMOOTHING,
    EPOHistorySettings,
    EPOSettings,
    advantages_with_history,
    corridor_penalty,
)
from hpo_verl.errors import ConfigError

NAN = float("nan")
PATH = "actor_rollout_ref.actor.policy_loss"
MASK = torch.tensor([[True, True], [True, False]])
ENTROPY = torch.tensor([[1.0, 2.0], [6.0, NAN]])


def estimate(memory, progress=0.0, mask=MASK, **changes):
    rollout = Rollout(
        torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.int64), mask.any(dim=-1), mask,
        extras={"entropy": ENTROPY, "memory": memory, "progress": progress},
    )  # fmt: skip
    return advantages_with_history(rollout, EPOHistorySettings(**changes))


# ---------------------------------------------------------------- history


def test_the_first_step_has_no_corridor_and_begins_the_history():
    result = estimate({})
    assert result.memory == {"epo_entropy": 3.0, "epo_steps": 1.0}
    assert (result.token_fields[SMOOTHING] == 0).all()
    assert result.statistics == {"epo_smoothing": 0.0}
    assert result.values.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)


def test_a_later_step_reads_the_mean_of_the_steps_before_and_adds_its_own():
    # Means 1 and 2 before, 3 now: the corridor is about 1.5, the next one about 2.
    memory = {"epo_entropy": 1.5, "epo_steps": 2.0}
    result = estimate(memory, schedule="constant", smoothing=0.25)
    assert result.token_fields[HISTORY].tolist() == [[1.5, 1.5], [1.5, 0.0]]
    assert result.token_fields[SMOOTHING].tolist() == [[0.25, 0.25], [0.25, 0.0]]
    assert result.memory == {"epo_entropy": 2.0, "epo_steps": 3.0}
    assert result.statistics == {"epo_smoothing": 0.25, "epo_entropy_history": 1.5}
    assert memory == {"epo_entropy": 1.5, "epo_steps": 2.0}


def test_a_step_without_a_token_leaves_the_history():
    memory = {"epo_entropy": 1.5, "epo_steps": 2.0}
    assert estimate(memory, mask=torch.zeros(2, 2, dtype=torch.bool)).memory == {}


@pytest.mark.parametrize(
    ("progress", "weight"),
    [
        (0.0, 1.0),
        (0.25, 0.8 + 0.2 * math.exp(-1)),
        (0.5, 0.8 + 0.2 * math.exp(-2)),
        (0.75, 0.8 * math.exp(-1.5)),
        (1.0, 0.8 * math.exp(-3)),
    ],
)
def test_the_schedule_is_that_of_the_public_code(progress, weight):
    assert EPOHistorySettings().weight(progress) == pytest.approx(weight)
    assert EPOHistorySettings(smoothing=0.5).weight(progress) == pytest.approx(weight / 2)
    assert EPOHistorySettings(schedule="constant").weight(progress) == 1.0


# ---------------------------------------------------------------- penalty


def penalty_of(entropy, history=2.0, weight=1.0, mask=None, **changes):
    """The penalty in float64, and its gradient (None where it has none)."""
    entropy = torch.tensor([entropy], dtype=torch.float64, requires_grad=True)
    mask = torch.ones_like(entropy).bool() if mask is None else torch.tensor([mask]).bool()
    fields = {HISTORY: history * mask.double(), SMOOTHING: weight * mask.double()}
    penalty = corridor_penalty(entropy, mask, fields, EPOSettings(**changes))
    if not penalty.requires_grad:
        return penalty[0], None
    (gradient,) = torch.autograd.grad(penalty.sum(), entropy)
    return penalty.detach()[0], gradient[0]


def test_every_branch_of_the_distance_by_hand():
    # The corridor is [1, 3].
    values, slopes = penalty_of([0.25, 1.0, 2.0, 3.0, 4.5], weight=0.5)
    assert values.tolist() == [0.375, 0.0, 0.0, 0.0, 0.75]
    assert slopes[[0, 2, 4]].tolist() == [-0.5, 0.0, 0.5]
    # [0, 4]: the lower bound of 0 is never left.
    values, _ = penalty_of([0.0, 0.5, 5.0], corridor_low=0.0, corridor_high=2.0)
    assert values.tolist() == [0.0, 0.0, 1.0]


def test_the_gradient_is_that_of_finite_differences():
    entropy = torch.tensor([[0.2, 0.9, 1.7, 3.4], [0.1, 5.0, 2.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    fields = {HISTORY: 2.0 * mask.double(), SMOOTHING: 0.7 * mask.double()}
    for per in ("token", "response"):

        def function(x, per=per):
            return corridor_penalty(x, mask, fields, EPOSettings(0.6, 1.1, per=per))

        assert torch.autograd.gradcheck(function, (entropy.clone().requires_grad_(),))


def test_per_response_the_mean_over_live_tokens_is_held_in_the_corridor():
    # Mean 5 of two live tokens: 2 above, and half of the slope of each of the two tokens.
    values, slopes = penalty_of([4.0, 6.0, NAN], per="response", mask=[1, 1, 0])
    assert values.tolist() == [2.0, 2.0, 0.0]
    assert slopes.tolist() == [1.0, 1.0, 0.0]
    values, _ = penalty_of([0.0, 4.0], per="response")
    assert values.tolist() == [0.0, 0.0]


def test_the_public_codes_constant_has_no_gradient():
    values, slopes = penalty_of([0.5, 1.0, 2.0, 3.0, 9.0], weight=0.5, repo_compatible=True)
    assert values.tolist() == [0.05, 0.05, 0.0, 0.05, 0.05]
    assert slopes is None
    values, _ = penalty_of([0.5, 2.0], repo_compatible=True, penalty=3.0)
    assert values.tolist() == [3.0, 0.0]


# ---------------------------------------------------------------- loss and settings


def test_the_policy_loss_is_ppos_clip_by_hand():
    log_ratio = torch.tensor([1.5, 0.5, 1.5, 0.5], dtype=torch.float64).log()
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0], dtype=torch.float64)
    loss = clipped_loss(token_batch(log_ratio, advantages, (0.2, 0.3)), None)
    assert loss.values.tolist() == pytest.approx([-2.6, -1.0, 3.0, 1.6])
    assert loss.slopes.tolist() == pytest.approx([0.0, -1.0, 3.0, 0.0])


def objective(batch, settings):
    """The equation of the policy loss; `test_records` compares values and slopes with it."""
    ratio, (low, high) = batch.log_ratio.exp(), batch.clip_range
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)


def test_defaults_are_those_of_the_public_code():
    assert EPOHistorySettings() == EPOHistorySettings(1.0, "decay")
    assert EPOSettings() == EPOSettings(0.5, 1.5, "token", False, 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EPOSettings(corridor_low=1.5), f"{PATH}.corridor_low = 1.5: must be a number in"),
        (lambda: EPOSettings(corridor_high=0.9), f"{PATH}.corridor_high = 0.9: must be a number"),
        (lambda: EPOSettings(per="turn"), f"{PATH}.per = 'turn': must be one of token, response"),
        (lambda: EPOSettings(repo_compatible=1), f"{PATH}.repo_compatible = 1: must be true or"),
        (lambda: EPOSettings(penalty=NAN), f"{PATH}.penalty = nan: must be a number in [0, inf)"),
        (lambda: EPOHistorySettings(smoothing=-1), "algorithm.epo.smoothing = -1: must be a"),
        (lambda: EPOHistorySettings(schedule="x"), "algorithm.epo.schedule = 'x': must be one of"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(make, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        make()
