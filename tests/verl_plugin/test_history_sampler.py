"""Prompts are drawn by their history, SPO's, and the sampler goes on from a checkpoint."""

import io

import pytest
import torch
from torch.utils.data import StackDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from hpo_verl.algorithms.spo import SPOSettings, ValueTracker
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin.trainer import prompt_history as plugin
from hpo_verl.verl_plugin.trainer.prompt_history import (
    LastResponse,
    end_to_end,
    scoring_fields,
    taken_apart,
)


def make_sampler(prompts=20, batch=4, seed=0, **settings):
    return plugin.HistorySampler(ValueTracker(prompts, SPOSettings(**settings)), batch, seed)


def make_loader(sampler, batch=4):
    data = [{"text": f"p{i}"} for i in range(len(sampler))]
    return StatefulDataLoader(
        StackDataset(data, range(len(data))), batch_size=batch, sampler=sampler, drop_last=True,
        collate_fn=lambda items: [row for _, row in items],
    )  # fmt: skip


def learn(sampler, rows, step):
    """A reward that depends on prompt and step, so that weights move."""
    rewards = torch.tensor([float((row + step) % 3 == 0) for row in rows])
    sampler.history.update(torch.tensor(rows), rewards, torch.full((len(rows),), 0.9))
    for row in rows:
        sampler.last[row] = LastResponse(
            torch.tensor([row], dtype=torch.int32), torch.tensor([step, row], dtype=torch.int32),
            torch.tensor([True, step % 2 == 0]), torch.tensor([-0.5, -float(row)]),
        )  # fmt: skip


def test_a_batch_holds_no_prompt_twice():
    sampler = make_sampler(prompts=6)
    batches = iter(make_loader(sampler))
    # More batches than an epoch has: there is no end.
    for _ in range(10):
        rows = next(batches)
        assert len(set(rows)) == 4
        assert set(rows) <= set(range(6))
    assert len(sampler) == 6


def test_a_batch_is_drawn_with_the_weights_of_the_moment():
    sampler = make_sampler(prompts=50, batch=2, exploration=1e-6)
    batches = iter(make_loader(sampler, batch=2))
    next(batches)
    sampler.history.alpha = torch.full((50,), 1e-12, dtype=torch.float64)
    sampler.history.alpha[[7, 33]] = 0.5
    assert sorted(next(batches)) == [7, 33]


@pytest.mark.parametrize("seed", [0, None])
def test_saved_and_restored_it_goes_on_the_same(seed):
    """As verl does it: the loader's state through torch.save, into a fresh trainer."""
    first = make_sampler(seed=seed)
    loader = make_loader(first)
    batches = iter(loader)
    for step in range(5):
        learn(first, next(batches), step)
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)

    second = make_sampler(seed=99)
    again = make_loader(second)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    restored = iter(again)
    for step in range(5, 12):
        rows = next(batches)
        assert next(restored) == rows
        assert list(second.last) == list(first.last)
        for row, last in first.last.items():
            for ours, theirs in zip(last, second.last[row], strict=True):
                assert torch.equal(ours, theirs)
                assert ours.dtype == theirs.dtype
        learn(first, rows, step)
        learn(second, rows, step)
        assert torch.equal(first.history.alpha, second.history.alpha)
        assert torch.equal(first.history.beta, second.history.beta)


def test_a_state_in_the_middle_of_a_batch_keeps_what_was_drawn():
    first = make_sampler(batch=4)
    one = make_loader(first, batch=1)
    batches = iter(one)
    next(batches)
    second = make_sampler(batch=4, seed=5)
    again = make_loader(second, batch=1)
    again.load_state_dict(one.state_dict())
    restored = iter(again)
    assert [next(restored) for _ in range(9)] == [next(batches) for _ in range(9)]


def test_a_state_of_another_training_set_is_refused():
    loader = make_loader(make_sampler(prompts=20))
    next(iter(loader))
    other = make_loader(make_sampler(prompts=21))
    other.load_state_dict(loader.state_dict())
    with pytest.raises(DataError, match="20 prompts, but the training set has 21"):
        iter(other)


def test_last_responses_keep_their_lengths_and_types():
    assert taken_apart(end_to_end({})) == {}
    last = LastResponse(
        torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([True, False]), torch.tensor([-0.5, -1.5]),
    )  # fmt: skip
    fields = scoring_fields([last, last])
    assert fields["input_ids"].unbind()[1].tolist() == [5, 6, 7, 1, 2]
    assert fields["position_ids"].unbind()[0].tolist() == [0, 1, 2, 3, 4]
    assert fields["prompts"].unbind()[0].tolist() == [5, 6, 7]
    assert fields["responses"].unbind()[0].tolist() == [1, 2]
    assert fields["loss_mask"].unbind()[0].tolist() == [1, 0]
    assert all(column.dtype == torch.int64 for column in fields.values())
