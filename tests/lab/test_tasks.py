"""Questions, rewards, and the two authors of the warm start."""

import random

import pytest
import torch
from lab_policies import random_policy

from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.lab import warm_start
from hpo_verl.lab.tasks import TASKS, find_task, puzzle_key

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


def test_texts_fit_the_longest_response_and_differ_in_length(task):
    train, _ = task.questions(*SIZES, 0)
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    authors = [author for author in (task.worked, task.careless) if author is not None]
    lengths = set()
    for author in authors:
        for _ in range(200):
            text = author(rng, train).response
            lengths.add(len(tokenizer.encode(text, add_special_tokens=False)) + 1)
    assert max(lengths) <= task.max_response_length
    assert len(authors) == 1 or max(lengths) - min(lengths) >= 5


def test_the_working_author_is_right_and_the_careless_one_never(task):
    train, _ = task.questions(*SIZES, 0)
    rng = random.Random(0)
    truths = {question.messages[-1]["content"]: question.ground_truth for question in train}

    def success(author):
        scores = []
        for _ in range(400):
            shown = author(rng, train)
            prompt = shown.messages[-1]["content"]
            truth = truths.get(prompt)
            if truth is None:
                numbers, _, target = prompt.partition("=")
                truth = {"numbers": list(map(int, numbers.split())), "target": int(target)}
            scores.append(task.score(shown.response, truth))
        return sum(scores) / len(scores)

    assert success(task.careless) == 0.0
    if task.name == "countdown4":
        assert success(task.worked) == 1.0


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean countdown"):
        find_task("countdown")


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path))
    return warm_start.WarmStart(find_task("countdown3"), 0.1, 0, 20, 10)


def measured(monkeypatch, values):
    """Let the success be what the list says, one value after another."""
    left = list(values)
    monkeypatch.setattr(warm_start, "success_rate", lambda *arguments: left.pop(0))
    return left


@pytest.fixture
def skilled(monkeypatch):
    policy = random_policy(len(build_tokenizer()))
    policy.tokenizer = build_tokenizer()
    policy.end, policy.pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
    monkeypatch.setattr(warm_start, "_skilled", lambda *arguments: policy)
    return policy


def test_careless_answers_are_imitated_until_the_level_is_reached(start, skilled, monkeypatch):
    before = [weight.detach().clone() for weight in skilled.model.parameters()]
    left = measured(monkeypatch, [0.4, 0.2, 0.09, 0.05])
    assert warm_start.make(start) == 0.09
    assert left == [0.05]
    changed = zip(before, skilled.model.parameters(), strict=True)
    assert any((old != new).any() for old, new in changed)
    # It is kept: nothing is measured again.
    assert warm_start.make(start) == 0.09
    assert left == [0.05]


def test_a_skilled_policy_below_the_level_stays_as_it_is(start, skilled, monkeypatch):
    measured(monkeypatch, [0.07])
    before = [weight.detach().clone() for weight in skilled.model.parameters()]
    assert warm_start.make(start) == 0.07
    assert all(map(torch.equal, before, skilled.model.parameters()))


def test_a_level_that_is_not_reached_is_an_error(start, skilled, monkeypatch):
    monkeypatch.setattr(warm_start, "_HABIT_STEPS", 2)
    measured(monkeypatch, [0.5] * 4)
    with pytest.raises(DataError, match=r"still 50\.0%"):
        warm_start.make(start)
    assert not start.folder.exists()


def test_a_damaged_or_outdated_policy_is_made_again(start, skilled, monkeypatch):
    measured(monkeypatch, [0.09, 0.095, 0.085])
    assert warm_start.make(start) == 0.09
    (start.folder / "model.safetensors").write_bytes(b"damaged")
    assert warm_start.make(start) == 0.095
    monkeypatch.setattr(warm_start, "VERSION", warm_start.VERSION + 1)
    assert warm_start.make(start) == 0.085


def test_imitation_lowers_the_loss(start, skilled):
    train, _ = start.task.questions(20, 10, 0)
    rng = random.Random(0)
    shown = [start.task.careless(rng, train) for _ in range(8)]
    optimizer = torch.optim.AdamW(skilled.model.parameters(), lr=1e-2)
    losses = [warm_start.imitate(skilled, optimizer, shown) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
