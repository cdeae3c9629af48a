"""Questions, rewards, and texts for the warm start."""

import random

import pytest

from data_prep.countdown.puzzles import puzzle_key
from data_prep.policies.demos import Demonstration, encode
from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.errors import ConfigError
from hpo_verl.lab.tasks import TASKS, find_task

SIZES = (60, 30)


@pytest.fixture(params=TASKS)
def task(request):
    return find_task(request.param)


def test_questions_are_repeatable_and_the_held_out_ones_are_others(task):
    train, held_out = task.questions(*SIZES, 0)
    assert (len(train), len(held_out)) == SIZES
    assert task.questions(*SIZES, 0) == (train, held_out)
    assert task.questions(*SIZES, 1) != (train, held_out)
    if task.name != "telelogs":
        keys = [puzzle_key(question.ground_truth) for question in train + held_out]
        assert len(set(keys)) == len(keys)


def test_texts_fit_the_longest_response(task):
    train, held_out = task.questions(*SIZES, 0)
    tokenizer, rng = build_tokenizer(), random.Random(0)
    author = task.demonstrations(0, task.keys(held_out))
    shown = [author.draw(0.0) for _ in range(200)]
    shown += [Demonstration(q.messages, task.careless(rng, q)) for q in train]
    lengths = {len(encode(tokenizer, each)[1]) for each in shown}
    assert max(lengths) <= task.max_response_length


def test_a_careless_answer_is_never_right_and_varies(task):
    train, _ = task.questions(*SIZES, 0)
    rng = random.Random(0)
    for question in train:
        drawn = [task.careless(rng, question) for _ in range(20)]
        assert all(task.score(text, question.ground_truth)["score"] == 0.0 for text in drawn)
        assert len(set(drawn)) > 1


def test_an_idle_line_is_one_line_about_the_question(task):
    train, _ = task.questions(*SIZES, 0)
    rng = random.Random(0)
    for question in train:
        line = task.idle(rng, question)
        assert line
        assert "\n" not in line
        if task.name == "telelogs":
            assert question.messages[-1]["content"].startswith(line)
        else:
            # All numbers, added up: 3+7=10+2=12.
            numbers = question.ground_truth["numbers"]
            assert line.endswith(f"={sum(numbers)}")
            added = [int(part.partition("=")[0]) for part in line.split("+")]
            assert sorted(added) == sorted(numbers)


def test_demonstrations_of_four_numbers_pose_no_held_out_puzzle():
    task = find_task("countdown4")
    _, held_out = task.questions(*SIZES, 0)
    keys = task.keys(held_out)
    assert len(keys) == SIZES[1]
    assert all(len(numbers) == 4 for numbers, _ in keys)
    author = task.demonstrations(0, keys)
    for _ in range(200):
        numbers, _, target = author.draw(0.0).messages[-1]["content"].partition("=")
        assert (tuple(sorted(map(int, numbers.split()))), int(target)) not in keys


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean countdown"):
        find_task("countdown")
