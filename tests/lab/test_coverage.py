"""pass@k over held-out questions, against counts by hand."""

import dataclasses

import pytest
from lab_policies import quick_study, tiny_random_policy

from hpo_verl.lab.coverage import coverage
from hpo_verl.lab.rollout import answers
from hpo_verl.lab.tasks import find_task
from hpo_verl.lab.trainer import Trainer


@pytest.fixture
def questions():
    return find_task("countdown3").questions(4, 4, 0)[1]


def scored(rewards):
    """The task, whose reward of one answer after the other is given."""
    left = iter(rewards)
    return dataclasses.replace(
        find_task("countdown3"), score=lambda text, truth: {"score": float(next(left))}
    )


def test_the_chance_that_one_of_k_answers_is_right_by_hand(questions):
    # Of four answers to each question, none, one, two and four are right.
    rewards = [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1]
    found = coverage(tiny_random_policy(), scored(rewards), questions, (0,), 3, 4)
    # Two of four miss with C(3, 2) / C(4, 2) = 1 / 2 and C(2, 2) / C(4, 2) = 1 / 6.
    two = (0 + 1 / 2 + 5 / 6 + 1) / 4
    assert found == pytest.approx({"pass@1": 7 / 16, "pass@2": two, "pass@4": 3 / 4})


def test_one_answer_is_right_as_often_as_answers_are_on_average(questions):
    task = dataclasses.replace(
        find_task("countdown3"), score=lambda text, truth: {"score": float(len(text) % 2)}
    )
    policy, repeated = tiny_random_policy(), [each for each in questions for _ in range(8)]
    rewards = answers(policy, task, repeated, (0,), 6).rewards
    assert 0 < rewards.mean() < 1
    found = coverage(policy, task, questions, (0,), 6, 8)
    assert found["pass@1"] == pytest.approx(float(rewards.mean()))
    assert sorted(found.values()) == list(found.values())


@pytest.mark.parametrize(
    ("samples", "ks"), [(1, [1]), (6, [1, 2, 4]), (64, [1, 2, 4, 8, 16, 32, 64])]
)
def test_k_doubles_up_to_the_answers(samples, ks, questions):
    task = scored([0] * samples)
    found = coverage(tiny_random_policy(), task, questions[:1], (0,), 2, samples)
    assert found == {f"pass@{k}": 0.0 for k in ks}


def test_a_run_answers_the_first_held_out_questions_where_samples_are_asked_for(graded):
    policy = tiny_random_policy()
    assert Trainer(quick_study().cells()[0], policy).coverage(0) == {}
    changes = ["evaluation.samples=4", "evaluation.sampled_questions=3"]
    trainer = Trainer(quick_study("rates", *changes).cells()[0], policy)
    found = trainer.coverage(0)
    assert set(found) == {"pass@1", "pass@2", "pass@4"}
    # Twelve answers.
    assert found["pass@1"] * 12 == pytest.approx(round(found["pass@1"] * 12))
    assert trainer.coverage(0) == found
