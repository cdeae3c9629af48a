"""Warm starts: policies that are brought to a level of success, and kept."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from lab_policies import quick_study, tiny_random_policy

from data_prep.policies import tiny as tiny_policy
from data_prep.policies.demos import encode, token_batch
from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.errors import DataError
from hpo_verl.lab import settings, warm_start
from hpo_verl.lab.tasks import find_task


@pytest.fixture
def cell():
    changes = ["warm_start=0.1", "training.questions=20", "evaluation.questions=10"]
    return quick_study("rates", *changes).cells()[0]


@pytest.fixture
def skilled(monkeypatch):
    """A random policy in the place of the skilled one."""
    policy = tiny_random_policy()
    before = [weight.detach().clone() for weight in policy.model.parameters()]

    def load(folder):
        for weight, value in zip(policy.model.parameters(), before, strict=True):
            weight.data.copy_(value)
        return policy

    monkeypatch.setattr(warm_start, "_skilled_folder", lambda *arguments: "skilled")
    monkeypatch.setattr(warm_start.Policy, "load", load)
    monkeypatch.setattr(warm_start, "_HABIT_STEPS", 4)
    return policy


def measured(monkeypatch, first, values=()):
    """Let the success be `first` at the start, and what the list says after that."""
    left, answer = list(values), warm_start.answers

    def answers(policy, task, asked, *arguments):
        found = answer(policy, task, asked, *arguments)
        right = torch.arange(len(asked)) < round(first * len(asked))
        return found._replace(numbers={"score": right.float()})

    monkeypatch.setattr(warm_start, "answers", answers)
    monkeypatch.setattr(warm_start, "_success", lambda *arguments: left.pop(0))
    return left


def weights_of(policy):
    return [weight.detach().clone() for weight in policy.model.parameters()]


def test_careless_answers_are_imitated_until_the_level_is_reached(cell, skilled, monkeypatch):
    before = weights_of(skilled)
    # 15 % of the level on either side is near enough.
    left = measured(monkeypatch, 0.4, [0.2, 0.08, 0.116, 0.086, 0.05])
    assert warm_start.make(cell) == 0.086
    assert left == [0.05]
    assert not all(map(torch.equal, before, skilled.model.parameters()))
    # It is kept: nothing is measured again.
    assert warm_start.make(cell) == 0.086
    assert left == [0.05]


def test_at_a_low_level_two_answers_of_those_that_are_measured_are_near_enough(
    cell, skilled, monkeypatch
):
    low = dataclasses.replace(cell, warm_start=0.005)
    left = measured(monkeypatch, 0.4, [0.005 + 3 / 1024, 0.005 - 1.9 / 1024, 0.005])
    assert warm_start.make(low) == 0.005 - 1.9 / 1024
    assert left == [0.005]


def test_a_skilled_policy_below_the_level_stays_as_it_is(cell, skilled, monkeypatch):
    measured(monkeypatch, 0.0625)
    before = weights_of(skilled)
    assert warm_start.make(cell) == 0.0625
    assert all(map(torch.equal, before, skilled.model.parameters()))


def test_a_level_that_is_not_reached_is_an_error(cell, skilled, monkeypatch):
    monkeypatch.setattr(warm_start, "_ADJUSTING_STEPS", 3)
    left = measured(monkeypatch, 0.5, [0.5, 0.4, 0.3, 0.1])
    message = (
        r"^warm start countdown3, seed 0: the success is 30\.0% at the end, not 10\.0%; "
        "choose another warm_start$"
    )
    with pytest.raises(DataError, match=message):
        warm_start.make(cell)
    assert left == [0.1]
    assert not warm_start.policy_folder(cell).exists()


@pytest.mark.parametrize(("level", "wrong_length"), [(0.1, None), (0.3, 2)])
def test_own_answers_are_shown_as_often_as_the_level_asks(
    cell, skilled, monkeypatch, level, wrong_length
):
    """Success 0.4 shall become the level, so level / 0.4 of the answers shown are own ones."""
    monkeypatch.setattr(warm_start, "_HABIT_STEPS", 40)
    measured(monkeypatch, 0.4, [2 * level, level / 2, level])
    batches, lengths, wrong = [], [], []
    careless = warm_start._careless

    def note(*arguments):
        lengths.append(arguments[-1])
        wrong.append(careless(*arguments))
        return wrong[-1]

    monkeypatch.setattr(warm_start, "_careless", note)
    # The pools hold demonstrations, and a batch is a list of them.
    monkeypatch.setattr(warm_start, "encode", lambda tokenizer, shown: shown)
    monkeypatch.setattr(warm_start, "token_batch", list)
    monkeypatch.setattr(
        warm_start, "train", lambda model, shown, optimizers: batches.append(list(shown))
    )
    warm_start.make(dataclasses.replace(cell, warm_start=level, wrong_length=wrong_length))
    places = set(map(id, wrong))
    habit, finer, down, up = (
        [id(each) not in places for batch in part for each in batch] for part in batches
    )
    assert (len(habit), len(finer)) == (30 * 64, 10 * 64)
    share = level / 0.4
    drawn = habit + finer
    spread = math.sqrt(share * (1 - share) / len(drawn))
    # The success is counted in whole answers.
    assert abs(sum(drawn) / len(drawn) - share) < 4 * spread + 0.001
    # Above the level only careless answers are shown, below it only own ones.
    assert (len(down), sum(down)) == (64, 0)
    assert (len(up), sum(up)) == (64, 64)
    # Lengths are counted in average right answers, of which the longest has 24 tokens.
    assert len(set(lengths)) == 1
    assert (lengths[0] is None) == (wrong_length is None)
    assert wrong_length is None or wrong_length < lengths[0] <= wrong_length * 24


def test_a_damaged_or_outdated_policy_is_made_again(cell, skilled, monkeypatch):
    measured(monkeypatch, 0.4, [0.09, 0.095, 0.102])
    assert warm_start.make(cell) == 0.09
    (warm_start.policy_folder(cell) / "model.safetensors").write_bytes(b"damaged")
    assert warm_start.make(cell) == 0.095
    monkeypatch.setattr(settings, "WARM_START_VERSION", settings.WARM_START_VERSION + 1)
    assert warm_start.make(cell) == 0.102


def test_a_policy_of_the_users_is_where_the_warm_start_begins(cell, skilled, monkeypatch):
    asked = []
    load = warm_start.Policy.load
    monkeypatch.setattr(warm_start.Policy, "load", lambda f: asked.append(f) or load(f))
    measured(monkeypatch, 0.0625)
    warm_start.make(dataclasses.replace(cell, policy="~/mine"))
    assert asked == [Path("~/mine").expanduser()]


def test_a_skill_that_was_not_taught_to_its_end_is_not_used(monkeypatch):
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


def likelihood(policy):
    """Mean probability, geometrically, of a token of demonstrations of three numbers."""
    author = find_task("countdown3").demonstrations(9, set())
    pairs = [encode(policy.tokenizer, author.draw(0.0)) for _ in range(32)]
    tokens, labels = token_batch(pairs)
    with torch.no_grad():
        logits = policy.model(input_ids=tokens).logits.flatten(0, 1)
    return math.exp(-float(torch.nn.functional.cross_entropy(logits, labels.flatten())))


def test_where_skill_is_lacking_an_untrained_policy_learns_up_to_the_level(cell, monkeypatch):
    """With a likelihood in the place of the success, which takes minutes to learn."""
    monkeypatch.setattr(warm_start, "_LACKING_EVERY", 2)
    monkeypatch.setattr(warm_start, "_SKILL_BATCH", 16)
    found = []

    def success(policy, *_):
        found.append(likelihood(policy))
        return found[-1]

    monkeypatch.setattr(warm_start, "_success", success)
    beginner = dataclasses.replace(cell, lacking="skill", warm_start=0.15)
    reached = warm_start.make(beginner)
    # It rises from less than the level, and training stops as soon as the level is met.
    assert len(found) > 1
    assert max(found[:-1]) < 0.15 <= found[-1] == reached
    kept = warm_start.Policy.load(warm_start.policy_folder(beginner))
    assert likelihood(kept) == pytest.approx(reached, rel=1e-4)
    assert len(kept.tokenizer) == len(build_tokenizer())


@pytest.mark.parametrize("rises", [True, False])
def test_the_last_batches_count_where_skill_is_lacking(cell, monkeypatch, rises):
    monkeypatch.setattr(warm_start, "_LACKING_BATCHES", 2)
    monkeypatch.setattr(warm_start, "train", lambda *arguments: None)
    measured(monkeypatch, 0.0, [0.01, 0.2 if rises else 0.06])
    beginner = dataclasses.replace(cell, lacking="skill")
    if rises:
        assert warm_start.make(beginner) == 0.2
        return
    with pytest.raises(DataError, match=r"the success is 6\.0% at the end, not 10\.0%"):
        warm_start.make(beginner)


def test_every_setting_that_decides_the_policy_has_a_folder_of_its_own(cell, tmp_path):
    mine, others = tmp_path / "mine", tmp_path / "others"
    for folder in (mine, others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(folder.name.encode())
    training = dataclasses.replace(cell.training, questions=21)
    evaluation = dataclasses.replace(cell.evaluation, questions=11)
    changes = [
        {}, {"task": "countdown4"}, {"lacking": "skill"}, {"warm_start": 0.11},
        {"wrong_length": 1}, {"wrong_length": 4}, {"max_response_length": 25}, {"seed": 1},
        {"training": training}, {"evaluation": evaluation},
        {"policy": str(mine)}, {"policy": str(others)},
    ]  # fmt: skip
    folders = [warm_start.policy_folder(dataclasses.replace(cell, **one)) for one in changes]
    assert len(set(folders)) == len(changes)
    # What only training reads changes nothing.
    same = dataclasses.replace(
        cell, study="other", variant="other", algorithm="hpo", settings={"x": 1},
        training=dataclasses.replace(cell.training, learning_rate=1.0, steps=9, epochs=2, lag=1),
        evaluation=dataclasses.replace(cell.evaluation, samples=4, dissect_every=1),
        max_response_length=24,
    )  # fmt: skip
    assert warm_start.policy_folder(same) == folders[0]
    # A folder with other weights in it is another policy.
    (mine / "model.safetensors").write_bytes(b"changed")
    changed = warm_start.policy_folder(dataclasses.replace(cell, policy=str(mine)))
    assert changed not in folders
