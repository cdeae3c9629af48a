"""Which questions come next, and what is kept of them."""

import pytest
import torch
from lab_policies import keep_warm_starts, quick_study

from hpo_verl.lab.policy import Policy, Responses
from hpo_verl.lab.questions import ShuffledQuestions
from hpo_verl.lab.trainer import Rollout, Trainer


def test_every_question_comes_once_per_epoch_in_another_order_each():
    def draws(*counts):
        source, generator = ShuffledQuestions(10), torch.Generator().manual_seed(0)
        return [source.draw(count, generator) for count in counts]

    first, second = draws(10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    start, rest = draws(4, 16)
    assert start + rest == first + second


def test_a_history_learns_how_far_the_policy_has_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path))
    study = quick_study("sparse", "tasks=[countdown3]", "warm_starts=[0.05]")
    keep_warm_starts(study)
    cell = next(cell for cell in study.cells() if cell.variant == "spo")
    trainer = Trainer(cell, Policy.load(cell.start.folder))
    learnt = []
    monkeypatch.setattr(trainer.order, "learn", lambda *given: learnt.append(given) or {})
    monkeypatch.setattr(
        trainer.policy, "log_probs", lambda prompts, tokens, mask: torch.full(mask.shape, -1.0)
    )

    def visit(questions, log_probs, lengths):
        mask = torch.arange(2) < torch.tensor(lengths)[:, None]
        responses = Responses(torch.ones(mask.shape, dtype=torch.int64), mask, log_probs * mask)
        prompts = [(1,)] * len(questions)
        rewards = torch.ones(len(questions))
        trainer._learn(Rollout(torch.tensor(questions), prompts, responses, rewards))
        _, _, drift, revisited = learnt[-1]
        return drift.tolist(), revisited

    first = torch.tensor([[-0.9, -0.7], [-1.5, 7.0]])
    assert visit([2, 0], first, [2, 1]) == ([0.0, 0.0], 0)
    # Question 2 again: |-1 + 0.9| and |-1 + 0.7|, mean 0.2; question 0: 0.5 on its one token.
    drift, revisited = visit([1, 2, 0], torch.zeros(3, 2), [1, 1, 1])
    assert drift == pytest.approx([0.0, 0.2, 0.5])
    assert revisited == 2
