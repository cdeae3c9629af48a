"""Which questions come next, and what is kept of them."""

import pytest
import torch
from lab_policies import quick_study, tiny_random_policy

from hpo_verl.lab.policy import Responses
from hpo_verl.lab.rollout import Rollout
from hpo_verl.lab.trainer import Trainer


def trainer_of(variant):
    cell = quick_study("neighbours", only=[variant]).cells()[0]
    return Trainer(cell, tiny_random_policy())


def test_every_question_comes_once_per_epoch_in_another_order_each():
    def draws(*counts):
        trainer = trainer_of("grpo")
        return [trainer.draw(count) for count in counts]

    first, second = draws(16, 16)
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
    start, rest = draws(4, 28)
    assert start + rest == first + second


def test_a_history_learns_how_far_the_policy_has_moved(monkeypatch):
    trainer = trainer_of("spo")
    learnt = []
    monkeypatch.setattr(trainer.history, "learn", lambda *given: learnt.append(given) or {})
    monkeypatch.setattr(
        trainer.policy, "log_probs", lambda prompts, tokens, mask: torch.full(mask.shape, -1.0)
    )

    def visit(questions, log_probs, lengths):
        mask = torch.arange(2) < torch.tensor(lengths)[:, None]
        responses = Responses(torch.ones(mask.shape, dtype=torch.int64), mask, log_probs * mask)
        prompts = [(1,)] * len(questions)
        rewards = torch.ones(len(questions))
        trainer._learn(Rollout(torch.tensor(questions), prompts, responses, {"score": rewards}))
        _, _, drift, revisited = learnt[-1]
        return drift.tolist(), revisited

    first = torch.tensor([[-0.9, -0.7], [-1.5, 7.0]])
    assert visit([2, 0], first, [2, 1]) == ([0.0, 0.0], 0)
    # Question 2 again: |-1 + 0.9| and |-1 + 0.7|, mean 0.2; question 0: 0.5 on its one token.
    drift, revisited = visit([1, 2, 0], torch.zeros(3, 2), [1, 1, 1])
    assert drift == pytest.approx([0.0, 0.2, 0.5])
    assert revisited == 2
