"""Careless answers of the warm start: wrong, and of the length that is asked for."""

import random

import pytest
from lab_policies import tiny_random_policy

from data_prep.policies.demos import encode
from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.lab import warm_start
from hpo_verl.lab.rollout import answers
from hpo_verl.lab.tasks import TASKS, find_task


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(params=TASKS)
def task(request):
    return find_task(request.param)


def shown(task, tokenizer, length, count=300):
    """Careless demonstrations, their questions, and their tokens."""
    rng = random.Random(0)
    questions = rng.choices(task.questions(60, 10, 0)[0], k=count)
    drawn = [warm_start._careless(rng, task, each, tokenizer, length) for each in questions]
    return questions, drawn, [len(encode(tokenizer, each)[1]) for each in drawn]


@pytest.mark.parametrize("length", [None, 15, 30, 60])
def test_they_are_never_right_and_end_with_the_answer(task, tokenizer, length):
    for question, drawn, _ in zip(*shown(task, tokenizer, length), strict=True):
        assert drawn.messages == question.messages
        assert task.score(drawn.response, question.ground_truth)["score"] == 0.0
        *idle, answer = drawn.response.split("\n")
        assert answer.startswith(("<answer>", "\\boxed{"))
        assert bool(idle) <= (length is not None)


@pytest.mark.parametrize("length", [20, 40, 80])
def test_they_have_the_length_that_is_asked_for(task, tokenizer, length):
    questions, _, lengths = shown(task, tokenizer, length)
    rng = random.Random(1)
    # A line with the break behind it.
    lines = [len(tokenizer.encode(task.idle(rng, each) + "\n")) for each in questions]
    half = max(lines) / 2
    assert abs(sum(lengths) / len(lengths) - length) <= sum(lines) / len(lines) / 2
    assert all(abs(found - length) <= half for found in lengths)


def test_without_a_length_they_are_the_answer_alone(task, tokenizer):
    _, drawn, lengths = shown(task, tokenizer, None)
    assert not any("\n" in each.response for each in drawn)
    # No length is shorter than the answer.
    assert shown(task, tokenizer, 1)[2] == lengths


def test_own_answers_that_were_cut_off_are_not_imitated():
    task, policy = find_task("countdown3"), tiny_random_policy()
    asked = task.questions(200, 10, 0)[0]
    given = answers(policy, task, asked, (0,), 12)
    own = warm_start._ended(policy, asked, given)
    texts = policy.decode(given.responses)
    expected = []
    for question, text, tokens, mask in zip(asked, texts, *given.responses[:2], strict=True):
        if policy.ends[0] in tokens[mask].tolist():
            expected.append((question.messages, text))
    assert own == expected
    assert 0 < len(own) < len(asked)
