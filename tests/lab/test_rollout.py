"""Responses with their rewards: what is said of them, and how they are chosen and joined."""

import math

import pytest
import torch
from lab_policies import END, PAD, random_policy, random_rollout

from hpo_verl.lab.policy import Responses
from hpo_verl.lab.rollout import Rollout, join


def rollout_of(rewards):
    """Four responses of 1, 2, 3 and 4 tokens, of which the second and the last do not end."""
    mask = torch.arange(4) < torch.tensor([1, 2, 3, 4])[:, None]
    tokens = torch.tensor(
        [[END, PAD, PAD, PAD], [5, 6, PAD, PAD], [5, 6, END, PAD], [5, END, 7, 8]]
    )
    log_probs = -torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0], [0.5, 0.5, 0, 0], [1, 1, 1, 3]])
    numbers = {"score": torch.tensor(rewards), "acc": torch.tensor(rewards)}
    responses = Responses(tokens, mask, log_probs)
    return Rollout(torch.tensor([7, 7, 3, 3]), [(1,), (1,), (2, 2), (2, 2)], responses, numbers)


def test_a_batch_is_described_by_hand():
    found = rollout_of([1.0, 0.0, 0.0, 1.0]).described([END])
    assert found == {
        # 1 + 2 + 1 + 6 nats on ten tokens.
        "entropy": pytest.approx(1.0),
        "response_length": 2.5,
        # Squares of 1.5, 0.5, 0.5 and 1.5, over three.
        "response_length_std": pytest.approx(math.sqrt(5 / 3)),
        "response_length_right": 2.5,
        "response_length_wrong": 2.5,
        "truncated": 0.5,
    }
    other = rollout_of([0.0, 0.0, 1.0, 1.0]).described([END, 8])
    assert (other["response_length_right"], other["response_length_wrong"]) == (3.5, 1.5)
    # Another token that ends a response.
    assert other["truncated"] == 0.25


@pytest.mark.parametrize(("reward", "absent"), [(0.0, "right"), (1.0, "wrong")])
def test_a_length_is_not_a_number_where_no_response_has_it(reward, absent):
    found = rollout_of([reward] * 4).described([END])
    assert math.isnan(found.pop(f"response_length_{absent}"))
    assert not any(math.isnan(value) for value in found.values())


def test_rows_are_chosen_and_joined_with_all_that_they_have():
    whole = rollout_of([1.0, 0.0, 0.0, 1.0])
    part = whole.at(torch.tensor([3, 0]))
    assert part.questions.tolist() == [3, 7]
    assert part.prompts == [(2, 2), (1,)]
    assert part.rewards.tolist() == [1.0, 1.0]
    assert torch.equal(part.responses.tokens, whole.responses.tokens[[3, 0]])
    again = join([whole.at(torch.tensor([0, 1])), whole.at(torch.tensor([2, 3]))])
    assert again.prompts == whole.prompts
    assert all(map(torch.equal, again.responses, whole.responses))
    assert all(torch.equal(again.numbers[name], whole.numbers[name]) for name in whole.numbers)


def test_the_entropy_is_that_of_the_drawn_tokens():
    rollout = random_rollout(random_policy(), [0.0] * 8)
    live = rollout.responses.log_probs[rollout.responses.mask]
    assert rollout.described([END])["entropy"] == pytest.approx(-float(live.mean()), rel=1e-5)
