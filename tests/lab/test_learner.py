"""Optimizer steps over a batch, against the ones that are made by hand."""

import dataclasses
import math

import pytest
import torch
from lab_policies import quick_study, random_policy, random_rollout, surrogate

from hpo_verl.lab.learner import Diverged, Learner
from hpo_verl.lab.recipes import read_objective
from hpo_verl.lab.tasks import find_task

REWARDS = [1.0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
WIDTH = 6


def learner_of(algorithm="grpo", **changes):
    task = dataclasses.replace(find_task("countdown3"), max_response_length=WIDTH)
    training = dataclasses.replace(quick_study().cells()[0].training, **changes)
    return Learner(random_policy(), read_objective(task, algorithm), training)


def batch_of(learner):
    rollout = random_rollout(learner.policy, REWARDS, WIDTH)
    groups = torch.arange(16) // 4
    mask = rollout.responses.mask
    advantages, _, _ = learner.objective.advantages(rollout.rewards, groups, mask, {})
    return rollout, advantages


def same_weights(first, second):
    return all(map(torch.equal, first.policy.weights, second.policy.weights))


def test_a_step_by_hand():
    learner = learner_of(max_grad_norm=0.01)
    other, (rollout, advantages) = learner.copied(), batch_of(learner)
    every = torch.arange(16)
    loss = surrogate(other.policy, rollout, advantages, every)
    gradients = torch.autograd.grad(loss, other.policy.weights)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert norm > 0.01
    sums, found = learner.mini_batch(rollout, advantages, {}, every)
    assert found == pytest.approx(norm, rel=1e-4)
    assert sums
    rate = learner.training.learning_rate
    for new, old, gradient in zip(
        learner.policy.weights, other.policy.weights, gradients, strict=True
    ):
        # Adam's first step, without weight decay: g / (|g| + 1e-8), of the clipped gradient.
        clipped = gradient * 0.01 / norm
        moved = -rate * clipped / (clipped.abs() + 1e-8)
        large = clipped.abs() > 1e-6
        torch.testing.assert_close((new - old)[large], moved[large], rtol=1e-2, atol=1e-6)


def test_two_passes_make_twice_the_steps_and_equal_two_updates():
    twice, once = learner_of(epochs=2), learner_of(epochs=1)
    rollout, advantages = batch_of(twice)
    row = twice.update(rollout, advantages, {}, 4)
    norms = [once.update(rollout, advantages, {}, 4)["gradient_norm"] for _ in range(2)]
    assert same_weights(twice, once)
    assert row["gradient_norm"] == pytest.approx(sum(norms) / 2)
    steps = {int(state["step"]) for state in twice.optimizer.state.values()}
    # Two mini-batches in each of two passes.
    assert steps == {4}


def test_mini_batches_hold_whole_groups_in_their_order():
    learner, other = learner_of(mini_batches=2), learner_of(mini_batches=2)
    rollout, advantages = batch_of(learner)
    learner.update(rollout, advantages, {}, 4)
    for rows in (torch.arange(8), torch.arange(8, 16)):
        other.mini_batch(rollout, advantages, {}, rows)
    assert same_weights(learner, other)


def test_a_copy_has_the_momenta_and_goes_its_own_way():
    learner = learner_of()
    rollout, advantages = batch_of(learner)
    learner.update(rollout, advantages, {}, 4)
    twin = learner.copied()
    assert same_weights(learner, twin)
    before = learner.copied()
    twin.update(rollout, advantages, {}, 4)
    assert same_weights(learner, before)
    assert not same_weights(learner, twin)
    learner.update(rollout, advantages, {}, 4)
    assert same_weights(learner, twin)


def test_momentum_alone_moves_nothing():
    learner = learner_of()
    rollout, advantages = batch_of(learner)
    learner.update(rollout, advantages, {}, 4)
    before = learner.copied()
    nothing = torch.zeros_like(advantages)
    assert learner.mini_batch(rollout, nothing, {}, torch.arange(16)) == ({}, 0.0)
    assert learner.update(rollout, nothing, {}, 4) == {"gradient_norm": 0.0}
    assert same_weights(learner, before)


@pytest.mark.parametrize("algorithm", ["grpo", "a_hpo"])
def test_leaving_out_rows_without_advantage_changes_no_gradient(algorithm):
    learner = learner_of(algorithm)
    rollout, advantages = batch_of(learner)
    assert (advantages == 0).all(dim=-1).any()
    tokens, mask, old = rollout.responses
    log_prob = learner.policy.log_probs(rollout.prompts, tokens, mask)
    counts = (int(mask.sum()), 16)
    slopes, _ = learner.objective.gradient(log_prob, old, advantages, mask, {}, counts)
    expected = torch.autograd.grad(log_prob, learner.policy.weights, slopes)
    learner.backward(rollout, advantages, {}, torch.arange(16))
    for weight, gradient in zip(learner.policy.weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_weight_that_is_not_finite_is_a_divergence():
    learner = learner_of()
    rollout, advantages = batch_of(learner)
    with torch.no_grad():
        learner.policy.weights[0].fill_(torch.nan)
    with pytest.raises(Diverged):
        learner.update(rollout, advantages, {}, 4)


def test_a_gradient_that_is_not_finite_is_a_divergence_and_makes_no_step():
    learner = learner_of()
    before = learner.copied()
    for weight in learner.policy.weights:
        weight.grad = torch.full_like(weight, torch.inf)
    with pytest.raises(Diverged, match="the gradient is not finite"):
        learner.step()
    assert same_weights(learner, before)
