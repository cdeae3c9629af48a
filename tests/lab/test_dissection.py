"""What positive and negative advantages do alone, against gradients and steps by hand."""

import copy
import dataclasses

import pytest
import torch
from lab_policies import quick_study, random_policy, random_rollout, surrogate, tiny_random_policy

from hpo_verl.lab.dissection import dissect
from hpo_verl.lab.learner import Learner
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.recipes import read_objective
from hpo_verl.lab.tasks import find_task
from hpo_verl.lab.trainer import Trainer

REWARDS = [1.0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
EVERY = torch.arange(16)
WIDTH = 6
SHIFTS = {"right_shift_positive", "right_shift_negative"}
NUMBERS = {"positive_gradient_norm", "negative_gradient_norm", "gradient_cosine", *SHIFTS}


def learner_of(algorithm="grpo"):
    task = dataclasses.replace(find_task("countdown3"), max_response_length=WIDTH)
    training = dataclasses.replace(quick_study().cells()[0].training, learning_rate=1e-3)
    return Learner(random_policy(), read_objective(task, algorithm), training)


def batch_of(learner, rewards=REWARDS):
    rollout = random_rollout(learner.policy, rewards, WIDTH)
    mask, groups = rollout.responses.mask, EVERY // 4
    advantages, _, _ = learner.objective.advantages(rollout.rewards, groups, mask, {})
    return rollout, advantages


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def gradient_of(learner, rollout, advantages):
    learner.backward(rollout, advantages, {}, EVERY)
    return flat([weight.grad.clone() for weight in learner.policy.weights])


def by_hand(policy, rollout, advantages, sign):
    rows = (advantages[:, 0] * sign > 0).nonzero().squeeze(1)
    return torch.autograd.grad(surrogate(policy, rollout, advantages, rows), policy.weights)


def right_log_prob(policy, rollout):
    tokens, mask, _ = rollout.responses
    with torch.no_grad():
        found = policy.log_probs(rollout.prompts, tokens, mask).sum(dim=-1)
    return float(found[rollout.rewards > 0].double().mean())


@pytest.mark.parametrize("algorithm", ["grpo", "a_hpo", "hysteretic_grpo"])
def test_the_two_gradients_sum_to_the_whole(algorithm):
    learner = learner_of(algorithm)
    rollout, advantages = batch_of(learner)
    whole = gradient_of(learner.copied(), rollout, advantages)
    positive = gradient_of(learner.copied(), rollout, advantages.clamp(min=0.0))
    negative = gradient_of(learner.copied(), rollout, advantages.clamp(max=0.0))
    torch.testing.assert_close(positive + negative, whole, rtol=1e-4, atol=1e-6)
    found = dissect(learner, rollout, advantages, {})
    assert found["positive_gradient_norm"] == pytest.approx(float(positive.norm()), rel=1e-5)
    assert found["negative_gradient_norm"] == pytest.approx(float(negative.norm()), rel=1e-5)
    # |p + n|^2 = |p|^2 + |n|^2 + 2 |p| |n| cos.
    p, n = found["positive_gradient_norm"], found["negative_gradient_norm"]
    square = p**2 + n**2 + 2 * p * n * found["gradient_cosine"]
    assert square == pytest.approx(float(whole.norm()) ** 2, rel=1e-3)


def test_norms_and_cosine_by_hand():
    learner = learner_of()
    rollout, advantages = batch_of(learner)
    found = dissect(learner, rollout, advantages, {})
    positive, negative = (
        flat(by_hand(learner.policy, rollout, advantages, sign)) for sign in (1, -1)
    )
    assert found["positive_gradient_norm"] == pytest.approx(float(positive.norm()), rel=1e-4)
    assert found["negative_gradient_norm"] == pytest.approx(float(negative.norm()), rel=1e-4)
    cosine = float(positive @ negative / positive.norm() / negative.norm())
    assert found["gradient_cosine"] == pytest.approx(cosine, abs=1e-4)
    assert set(found) == NUMBERS


@pytest.mark.parametrize("updates", [0, 1])
def test_shifts_are_those_of_one_optimizer_step_with_the_momenta_that_it_has(updates):
    learner = learner_of()
    rollout, advantages = batch_of(learner)
    for _ in range(updates):
        learner.update(rollout, advantages, {}, 4)
    # The batch is sampled by the policy as it is now.
    rollout, advantages = batch_of(learner)
    found = dissect(learner, rollout, advantages, {})
    before = right_log_prob(learner.policy, rollout)
    for name, sign in (("right_shift_positive", 1), ("right_shift_negative", -1)):
        policy = Policy(copy.deepcopy(learner.policy.model), learner.policy.tokenizer)
        optimizer = torch.optim.AdamW(policy.weights, lr=1e-3, weight_decay=0.0)
        state = copy.deepcopy(learner.optimizer.state_dict())
        optimizer.load_state_dict(state)
        for weight, gradient in zip(
            policy.weights, by_hand(policy, rollout, advantages, sign), strict=True
        ):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(policy.weights, learner.training.max_grad_norm)
        optimizer.step()
        shift = right_log_prob(policy, rollout) - before
        assert found[name] == pytest.approx(shift, rel=1e-2), name
    # Right responses have positive advantages in their groups.
    assert found["right_shift_positive"] > 0


def test_the_learner_stays_as_it_is():
    learner = learner_of()
    rollout, advantages = batch_of(learner)
    learner.update(rollout, advantages, {}, 4)
    twin = learner.copied()
    gradients = [weight.grad.clone() for weight in learner.policy.weights]
    state = copy.deepcopy(learner.optimizer.state_dict()["state"])
    dissect(learner, rollout, advantages, {})
    assert all(map(torch.equal, learner.policy.weights, twin.policy.weights))
    assert all(map(torch.equal, gradients, (w.grad for w in learner.policy.weights)))
    for key, values in learner.optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[name], state[key][name]) for name in values)


def test_what_cannot_be_said_is_left_out():
    learner = learner_of()
    rollout, advantages = batch_of(learner)
    positive = dissect(learner, rollout, advantages.clamp(min=0.0), {})
    assert set(positive) == NUMBERS - {"gradient_cosine", "right_shift_negative"}
    assert positive["negative_gradient_norm"] == 0.0
    assert positive["positive_gradient_norm"] > 0
    # Without a right response there is nothing whose probability could change.
    wrong = rollout._replace(numbers={"score": torch.zeros(16)})
    assert set(dissect(learner, wrong, advantages, {})) == NUMBERS - SHIFTS
    nothing = dissect(learner, rollout, torch.zeros_like(advantages), {})
    assert nothing == {"positive_gradient_norm": 0.0, "negative_gradient_norm": 0.0}


@pytest.mark.parametrize("variant", ["grpo", "a_hpo"])
def test_a_dissected_run_has_the_same_rows_otherwise(graded, variant):
    def rows(every):
        changes = ["training.steps=3", "training.lag=1", f"evaluation.dissect_every={every}"]
        cells = quick_study("rates", *changes).cells()
        cell = next(cell for cell in cells if cell.variant == variant)
        trainer = Trainer(cell, tiny_random_policy())
        found = [trainer.step(step) for step in (1, 2, 3)]
        # A length without such a response is no number, which equals nothing.
        return [{k: v for k, v in row.items() if k != "seconds" and v == v} for row in found]

    plain, dissected = rows(0), rows(2)
    assert not any(NUMBERS & set(row) for row in plain)
    assert [bool(NUMBERS & set(row)) for row in dissected] == [True, False, True]
    without = [{k: v for k, v in row.items() if k not in NUMBERS} for row in dissected]
    assert without == plain
