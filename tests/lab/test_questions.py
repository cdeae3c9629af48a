"""Which questions come next."""

from types import SimpleNamespace

import pytest
import torch

from hpo_verl.algorithms.spo import SPOSettings
from hpo_verl.lab.policy import Prompts
from hpo_verl.lab.questions import Shuffled, SingleStream
from hpo_verl.lab.sampling import Responses


def test_every_question_comes_once_per_epoch_in_another_order_each():
    source = Shuffled(10, (0, 1))
    first, second = source.draw(10), source.draw(10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    again = Shuffled(10, (0, 1))
    assert again.draw(4) + again.draw(16) == first + second
    assert source.values(torch.tensor(first)) is None


def responses(log_probs, lengths):
    mask = torch.arange(2) < torch.tensor(lengths)[:, None]
    log_probs = torch.tensor(log_probs) * mask
    return Responses(torch.ones(len(mask), 2, dtype=torch.int64), mask, log_probs, log_probs)


def observe(source, policy, questions, rewards, given):
    prompts = Prompts(torch.ones(len(questions), 1, dtype=torch.int64), torch.ones(len(questions)))
    source.observe(policy, torch.tensor(questions), prompts, given, torch.tensor(rewards))


class Scorer(SimpleNamespace):
    """Gives every token one log-probability."""

    def response_log_probs(self, prompts, tokens, mask):
        self.asked = len(prompts.lengths), tokens.shape
        return torch.full(tokens.shape, self.log_prob) * mask


def test_values_follow_the_rewards_and_forget_by_the_drift():
    settings = SPOSettings(rho_min=0.5, rho_max=0.9, drift_half=0.2)
    source = SingleStream(3, settings, seed=0)
    policy = Scorer(log_prob=-1.0)
    # First visit: D = 0, rho = 0.9; alpha = 0.45 + 1 and 0.45, beta = 0.45 and 0.45 + 1.
    observe(source, policy, [2, 0], [1.0, 0.0], responses([[-0.9, -0.9], [-1.0, 7.0]], [2, 1]))
    expected = torch.tensor([0.45 / 1.9, 0.5, 1.45 / 1.9], dtype=torch.float64)
    torch.testing.assert_close(source.values(torch.arange(3)), expected)
    assert not hasattr(policy, "asked")
    # Question 2 again: |-1 + 0.9| = 0.1 on both tokens, rho = 2^(-1/2).
    observe(source, policy, [1, 2], [0.0, 1.0], responses([[0.0, 0.0], [0.0, 0.0]], [1, 1]))
    assert policy.asked == (1, (1, 2))
    rho = 2**-0.5
    alpha, beta = rho * 1.45 + 1, rho * 0.45
    assert float(source.values(torch.tensor([2]))) == pytest.approx(alpha / (alpha + beta))


def test_questions_that_are_sometimes_solved_come_more_often():
    source = SingleStream(40, SPOSettings(exploration=0.01, rho_min=0.9, rho_max=0.9), seed=0)
    policy = Scorer(log_prob=0.0)
    given = responses([[0.0, 0.0]] * 20, [1] * 20)
    for _ in range(30):
        observe(source, policy, list(range(20)), [1.0] * 20, given)
    drawn = torch.tensor([source.draw(10) for _ in range(50)])
    assert all(len(set(row)) == 10 for row in drawn.tolist())
    # v of the first half is 0.98, of the rest 0.5: weights 0.14 and 0.51.
    assert (drawn >= 20).double().mean() > 0.65
