"""SPO as verl calls it: estimator, sampler and its state, checks."""

import io
import re

import pytest
import torch
from estimator_calls import call
from omegaconf import OmegaConf
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from hpo_verl.algorithms.spo import SPOSettings, ValueTracker
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin import spo
from hpo_verl.verl_plugin.trainer.last_responses import LastResponse, LastResponses, scoring_fields
from hpo_verl.verl_plugin.validation import check_algorithm, check_trainer_mode

# ---------------------------------------------------------------- estimator


def test_by_hand():
    # Differences .5, -.5, .75, -.75: deviation .735980.
    values = {"a": 0.5, "b": 0.5, "c": 0.25, "d": 0.75}
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    rewards = torch.zeros(4, 3)
    rewards[:, 0] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    advantages = call("spo", rewards, list("abcd"), mask=mask, lent={"values": values})
    expected = torch.tensor([0.679366, -0.679366, 1.019049, -1.019049])[:, None] * mask
    torch.testing.assert_close(advantages, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("reward", [-0.1, 1.5])
def test_a_reward_that_is_no_rate_is_refused(reward):
    with pytest.raises(DataError, match=rf"^spo: reward {reward} of response 1: must be in \[0, 1"):
        call("spo", [1.0, reward], ["a", "b"], lent={"values": {"a": 0.5, "b": 0.5}})


def test_a_prompt_without_a_value_is_refused():
    with pytest.raises(DataError, match=r"^spo: uid 'b' is of no prompt that was drawn"):
        call("spo", [1.0, 0.0], ["a", "b"], lent={"values": {"a": 0.5}})


def test_without_a_trainer_of_ours_the_estimator_says_which_to_use():
    with pytest.raises(ConfigError, match=r"'spo' needs values .*trainer_mode must be hpo_sync$"):
        get_adv_estimator_fn("spo")(
            token_level_rewards=torch.zeros(1, 1), response_mask=torch.ones(1, 1), index=["a"]
        )


def test_registering_twice_changes_nothing():
    spo.register()
    assert get_adv_estimator_fn("spo") is spo.estimate


# ---------------------------------------------------------------- sampler


def make_sampler(prompts=20, batch=4, seed=0, **settings):
    return spo.PrioritizedSampler(ValueTracker(prompts, SPOSettings(**settings)), batch, seed)


def make_loader(sampler, batch=4):
    data = [{"text": f"p{i}"} for i in range(len(sampler))]
    return StatefulDataLoader(
        spo.NumberedRows(data), batch_size=batch, sampler=sampler, drop_last=True,
        collate_fn=lambda items: [item[spo.ROW] for item in items],
    )  # fmt: skip


def learn(sampler, rows, step):
    """A reward that depends on prompt and step, so that weights move."""
    rewards = torch.tensor([float((row + step) % 3 == 0) for row in rows])
    sampler.tracker.update(torch.tensor(rows), rewards, torch.full((len(rows),), 0.9))
    for row in rows:
        sampler.last[row] = LastResponse(
            torch.tensor([row], dtype=torch.int32), torch.tensor([step, row], dtype=torch.int32),
            torch.tensor([True, step % 2 == 0]), torch.tensor([-0.5, -float(row)]),
        )  # fmt: skip


def test_items_tell_their_row_and_a_batch_holds_no_prompt_twice():
    sampler = make_sampler(prompts=6)
    assert spo.NumberedRows([{"x": 1}, {"x": 2}])[1] == {"x": 2, spo.ROW: 1}
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
    sampler.tracker.alpha = torch.full((50,), 1e-12, dtype=torch.float64)
    sampler.tracker.alpha[[7, 33]] = 0.5
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
        assert torch.equal(first.tracker.alpha, second.tracker.alpha)
        assert torch.equal(first.tracker.beta, second.tracker.beta)


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
    empty = LastResponses()
    empty.load_state_dict(LastResponses().state_dict())
    assert empty == {}
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


# ---------------------------------------------------------------- checks


def config(n=1, mode="hpo_sync", **algorithm):
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "spo", "spo": {}, **algorithm},
            "actor_rollout_ref": {
                "actor": {
                    "policy_loss": {"loss_mode": "vanilla"},
                    "loss_agg_mode": "token-mean",
                },
                "rollout": {"n": n},
            },
            "trainer": {"v1": {"trainer_mode": mode}},
        }
    )


def test_the_recipes_settings_pass():
    assert check_algorithm(config()) == []
    check_trainer_mode(config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 8}, "actor_rollout_ref.rollout.n = 8: algorithm.adv_estimator = 'spo' takes one"),
        ({"spo": {"rho_min": 2}}, "algorithm.spo.rho_min = 2: must be a number in [0, 0.999]"),
        ({"spo": {"rho": 0.9}}, "algorithm.spo.rho = 0.9: unknown setting"),
        ({"use_kl_in_reward": True}, "algorithm.use_kl_in_reward = True: adv_estimator = 'spo'"),
        ({"adv_estimator": "grpo", "spo": {"rho_min": 0.5}}, "'grpo' ignores it; use spo"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_algorithm(config(**changes))


@pytest.mark.parametrize("mode", ["sync", "hpo_colocate_async", "hpo_separate_async"])
def test_other_trainer_modes_are_refused(mode):
    with pytest.raises(ConfigError, match=f"trainer_mode = '{mode}': .*'spo' needs hpo_sync$"):
        check_trainer_mode(config(mode=mode))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as JSON"),
        ("[[1, 0], [", "cannot be read as JSON"),
        ('{"a": [1]}', "must hold a list of lists of numbers"),
        ("[1, 0]", "must hold a list of lists of numbers"),
        ('[[1], ["yes"]]', "must hold a list of lists of numbers"),
        ("[[true]]", "must hold a list of lists of numbers"),
    ],
)
def test_a_bad_file_of_offline_rewards_is_named(tmp_path, content, message):
    file = tmp_path / "rewards.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=rf"^algorithm\.spo\.initial_rewards: {file} {message}"):
        check_algorithm(config(spo={"initial_rewards": str(file)}))
