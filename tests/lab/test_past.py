"""The policy that samples, some steps behind the one that is trained."""

import dataclasses

import pytest
import torch
from lab_policies import quick_study, random_policy, tiny_random_policy

from hpo_verl.lab import trainer as trainer_module
from hpo_verl.lab.past import Past
from hpo_verl.lab.trainer import Trainer


def set_to(policy, value):
    with torch.no_grad():
        for weight in policy.weights:
            weight.fill_(value)


def value_of(policy):
    (value,) = {float(weight.unique()) for weight in policy.weights}
    return value


@pytest.mark.parametrize(
    ("lag", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (2, [0, 0, 0, 1, 2])]
)
def test_the_sampler_has_the_weights_of_so_many_steps_ago_and_the_first_ones_before(lag, expected):
    policy, found = random_policy(), []
    set_to(policy, 0)
    past = Past(policy, lag)
    assert (past.sampler is policy) == (lag == 0)
    for step in range(5):
        past.advance()
        found.append(value_of(past.sampler))
        # What training does to the weights.
        set_to(policy, step + 1)
    assert found == expected


def weights_of(policy):
    return [weight.detach().clone() for weight in policy.weights]


def test_a_run_with_a_lag_samples_with_older_weights_and_their_log_probs(graded, monkeypatch):
    study = quick_study("rates", "training.lag=2", "training.steps=4", "evaluation.every=9")
    trainer = Trainer(study.cells()[0], tiny_random_policy())
    begun, sampled, rollouts = [], [], []
    answers, update = trainer_module.answers, trainer.learner.update

    def note(policy, *arguments):
        sampled.append(weights_of(policy))
        begun.append(weights_of(trainer.policy))
        found = answers(policy, *arguments)
        again = policy.log_probs(found.prompts, found.responses.tokens, found.responses.mask)
        torch.testing.assert_close(found.responses.log_probs, again.detach(), rtol=1e-4, atol=1e-4)
        return found

    def keep(rollout, *arguments):
        rollouts.append(rollout)
        return update(rollout, *arguments)

    monkeypatch.setattr(trainer_module, "answers", note)
    monkeypatch.setattr(trainer.learner, "update", keep)
    for step in (1, 2, 3):
        trainer.step(step)
    trainer.past.advance()
    trainer._sample(4)
    for step, earlier in ((0, 0), (1, 0), (2, 0), (3, 1)):
        assert all(map(torch.equal, sampled[step], begun[earlier])), step
    assert not all(map(torch.equal, begun[1], begun[0]))
    # What is trained on carries the log-probabilities of the sampler, not of the trained policy.
    tokens, mask, log_probs = rollouts[2].responses
    with torch.no_grad():
        now = trainer.policy.log_probs(rollouts[2].prompts, tokens, mask)
    assert float((now - log_probs).abs().max()) > 1e-3


def test_without_a_lag_the_first_steps_are_the_same(graded):
    def rows(lag):
        cell = quick_study("rates").cells()[0]
        training = dataclasses.replace(cell.training, lag=lag)
        trainer = Trainer(dataclasses.replace(cell, training=training), tiny_random_policy())
        found = [trainer.step(1), trainer.step(2)]
        return [{k: v for k, v in row.items() if k not in ("seconds", "success")} for row in found]

    plain, lagging = rows(0), rows(1)
    assert plain[0] == lagging[0]
    # The second batch has other questions, and is sampled by the older policy.
    assert plain[1] != lagging[1]
