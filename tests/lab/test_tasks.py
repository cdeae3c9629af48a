"""Questions, rewards, and the authors of the warm cell."""

import dataclasses
import random

import pytest
import torch
from lab_policies import quick_study, tiny_random_policy

from data_prep.countdown.puzzles import puzzle_key
from data_prep.policies import tiny as tiny_policy
from data_prep.policies.demos import encode
from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.lab import settings, warm_start
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
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    shown = [task.careless(rng, train) for _ in range(200)]
    if task.demonstrations is not None:
        author = task.demonstrations(0, task.keys(held_out))
        shown += [author.draw(0.0) for _ in range(200)]
    lengths = {len(encode(tokenizer, each)[1]) for each in shown}
    assert max(lengths) <= task.max_response_length


def test_the_careless_author_is_never_right(task):
    train, _ = task.questions(*SIZES, 0)
    rng = random.Random(0)
    truths = {question.messages[-1]["content"]: question.ground_truth for question in train}
    for _ in range(400):
        shown = task.careless(rng, train)
        assert task.score(shown.response, truths[shown.messages[-1]["content"]])["score"] == 0.0


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


@pytest.fixture
def cell(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path))
    changes = ["warm_starts=[0.1]", "training.questions=20", "evaluation.questions=10"]
    return quick_study("alpha", *changes).cells()[0]


def measured(monkeypatch, values):
    """Let the success be what the list says, one value after another."""
    left = list(values)
    monkeypatch.setattr(warm_start, "success_rate", lambda *arguments: left.pop(0))
    return left


@pytest.fixture
def skilled(monkeypatch):
    policy = tiny_random_policy()
    before = [weight.detach().clone() for weight in policy.model.parameters()]

    def load(folder):
        for weight, value in zip(policy.model.parameters(), before, strict=True):
            weight.data.copy_(value)
        return policy

    monkeypatch.setattr(warm_start, "_skilled_folder", lambda *arguments: "skilled")
    monkeypatch.setattr(warm_start.Policy, "load", load)
    return policy


def test_careless_answers_are_imitated_until_the_level_is_reached(cell, skilled, monkeypatch):
    before = [weight.detach().clone() for weight in skilled.model.parameters()]
    left = measured(monkeypatch, [0.4, 0.2, 0.09, 0.05])
    assert warm_start.make(cell) == 0.09
    assert left == [0.05]
    changed = zip(before, skilled.model.parameters(), strict=True)
    assert any((old != new).any() for old, new in changed)
    # It is kept: nothing is measured again.
    assert warm_start.make(cell) == 0.09
    assert left == [0.05]


def test_a_skilled_policy_below_the_level_stays_as_it_is(cell, skilled, monkeypatch):
    measured(monkeypatch, [0.07])
    before = [weight.detach().clone() for weight in skilled.model.parameters()]
    assert warm_start.make(cell) == 0.07
    assert all(map(torch.equal, before, skilled.model.parameters()))


def test_a_level_that_is_not_reached_is_an_error(cell, skilled, monkeypatch):
    monkeypatch.setattr(warm_start, "_HABIT_STEPS", 2)
    measured(monkeypatch, [0.5] * 4)
    with pytest.raises(DataError, match=r"still 50\.0%"):
        warm_start.make(cell)
    assert not warm_start.policy_folder(cell).exists()


def test_a_damaged_or_outdated_policy_is_made_again(cell, skilled, monkeypatch):
    measured(monkeypatch, [0.09, 0.095, 0.085])
    assert warm_start.make(cell) == 0.09
    (warm_start.policy_folder(cell) / "model.safetensors").write_bytes(b"damaged")
    assert warm_start.make(cell) == 0.095
    monkeypatch.setattr(settings, "WARM_START_VERSION", settings.WARM_START_VERSION + 1)
    assert warm_start.make(cell) == 0.085


def test_a_skill_that_was_not_taught_to_its_end_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path))
    short = tiny_policy.Schedule(skill_steps=1, habit_steps=1, batch_size=2)
    monkeypatch.setitem(tiny_policy.SCHEDULES, "countdown", short)
    task = find_task("countdown4")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(warm_start, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            warm_start._skilled_folder(task, 0, [])
    assert not list(warm_start.cache_folder().glob("*"))
    monkeypatch.setattr(warm_start, "_SKILL_STEPS", 1)
    folder = warm_start._skilled_folder(task, 0, [])
    assert tiny_policy.check(folder)["task"] == "countdown"
    assert list(warm_start.cache_folder().iterdir()) == [folder]


def test_a_policy_of_the_users_is_where_the_warm_start_begins(cell, skilled, monkeypatch):
    asked = []
    load = warm_start.Policy.load
    monkeypatch.setattr(warm_start.Policy, "load", lambda f: asked.append(f) or load(f))
    measured(monkeypatch, [0.07])
    warm_start.make(dataclasses.replace(cell, policy="mine"))
    assert asked == ["mine"]
