"""GHPO: groups that fail whole are asked again with a hint, in the trainer and its settings."""

import copy

import pytest
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.verl_plugin.hints import (
    TEXT,
    HintSettings,
    hint_settings,
    hinted,
    reference,
    require_reference,
)
from hpo_verl.verl_plugin.run_validation import check_sampling
from hpo_verl.verl_plugin.trainer import hints as plugin
from hpo_verl.verl_plugin.trainer.hints import Hints

USER = {"role": "user", "content": "ask"}


def config(hints=None, mode="hpo_sync", **others):
    given = {
        "algorithm": {"adv_estimator": "grpo"},
        "actor_rollout_ref": {
            "rollout": {"n": 2, "custom": {"hints": {"enable": True, **(hints or {})}}}
        },
        "data": {"max_prompt_length": 200},
        "reward": {"reward_model": {"enable": False, "enable_resource_pool": False}},
        "trainer": {"v1": {"trainer_mode": mode, "sampler": {}}},
    }
    result = OmegaConf.create(given)
    for key, value in others.items():
        OmegaConf.update(result, key, value, force_add=True)
    return result


# ---------------------------------------------------------------- hints


def test_a_hint_is_the_beginning_of_the_solution_behind_the_last_message():
    system = {"role": "system", "content": "rules"}
    messages = [system, USER]
    assert hinted(messages, "0123456789", 0.25, " | ") == [
        system, {"role": "user", "content": "ask | 01"},
    ]  # fmt: skip
    # round(7.5) is 8, as in the public code.
    assert hinted(messages, "0123456789", 0.75, "")[1]["content"] == "ask01234567"
    assert messages == [system, USER]
    assert hinted(messages, "0", 0.25, " ") is None
    assert hinted(messages, "", 0.75, " ") is None
    assert hinted([{"role": "user", "content": [{"type": "text"}]}], "01", 0.75, " ") is None


def test_what_is_no_text_is_no_solution():
    assert reference({"solution": "1 + 2"}, "solution") == "1 + 2"
    for extra in (None, {}, {"solution": 3}, {"solution": None}):
        assert reference(extra, "solution") == ""
    rows = [{"extra_info": {"solution": "1"}}, {"extra_info": None}, {}]
    assert require_reference(rows, "solution") == 1
    with pytest.raises(DataError, match=r"hints\.by = 'hint': no sampled row has a text extra_"):
        require_reference(rows, "hint")


# ---------------------------------------------------------------- trainer


class Buffer:
    """verl's replay buffer: whole groups that were submitted, finished at once."""

    def __init__(self):
        self.submitted, self.sampled = [], []

    def sample(self, global_steps, partition_id, batch_size):
        uids, self.submitted = self.submitted, []
        assert len(uids) == batch_size
        self.sampled.append((global_steps, partition_id, uids))
        # Responses finish in any order.
        keys = [f"{uid}_{session}_0" for session in (1, 0) for uid in uids]
        return tq.KVBatchMeta(keys, [{"of": key} for key in keys], partition_id), {"verl": 1}


class Parent:
    """What verl's trainer does around the part tested here."""

    def __init__(self, config):
        self.config, self.tokenizer, self.stored, self.cleared = config, None, {}, []
        self.replay_buffer = self._build_replay_buffer()
        self.asked = []

    def _build_replay_buffer(self):
        return Buffer()

    def _submit_batch_to_rollout(self, batch):
        """Answer: a response is right where the last message holds what makes it so."""
        self.asked.append({})
        infos = list(batch["extra_info"])
        for row, (uid, messages) in enumerate(zip(batch["uid"], batch["raw_prompt"], strict=True)):
            text = messages[-1]["content"]
            self.asked[-1][uid] = text
            for session in (0, 1):
                assert f"{uid}_{session}_0" not in self.stored
                right = session == 1 and infos[row]["right_with"] in text
                self.stored[f"{uid}_{session}_0"] = [0.0, 1.0] if right else [0.0]
        assert batch["global_steps"] == 7
        self.replay_buffer.submitted += list(batch["uid"])
        return len(batch)


class Mode(Hints, Parent):
    pass


@pytest.fixture
def make(monkeypatch):
    """A function: settings -> a trainer whose step is `sample`."""

    def build(**given):
        trainer = Mode(config(**given))

        def get(keys, partition_id, select_fields):
            assert (partition_id, select_fields) == ("train", ["rm_scores"])
            rewards = [torch.tensor(trainer.stored[key]) for key in keys]
            return {"rm_scores": torch.nested.as_nested_tensor(rewards, layout=torch.jagged)}

        def clear(keys, partition_id):
            trainer.cleared += keys
            for key in keys:
                del trainer.stored[key]

        monkeypatch.setattr(tq, "kv_batch_get", get)
        monkeypatch.setattr(tq, "kv_clear", clear)
        count = lambda messages: len(messages[-1]["content"])  # noqa: E731
        monkeypatch.setattr(plugin, "prompt_counter", lambda config, tokenizer: count)
        return trainer

    return build


def submit(trainer, *rows):
    """Submit prompts of (uid, what a response needs to be right, solution)."""
    batch = tu.get_tensordict(
        {
            "uid": [uid for uid, _, _ in rows],
            "raw_prompt": [[USER] for _ in rows],
            "extra_info": [{"right_with": need, "solution": text} for _, need, text in rows],
        }
    )
    tu.assign_non_tensor_data(batch, "global_steps", 7)
    before = copy.deepcopy(list(batch["raw_prompt"]))
    trainer._submit_batch_to_rollout(batch)
    found = trainer.replay_buffer.sample(global_steps=7, partition_id="train", batch_size=len(rows))
    assert list(batch["raw_prompt"]) == before
    return found


def test_a_group_is_asked_again_with_more_until_a_response_succeeds(make):
    trainer = make()
    batch, metrics = submit(
        trainer, ("a", "ask", "01234567"), ("b", "0123", "01234567"), ("c", "z", "01234567"),
        ("d", "01", "01234567"),
    )  # fmt: skip
    assert trainer.asked == [
        dict.fromkeys("abcd", "ask"),
        dict.fromkeys("bcd", f"ask{TEXT}01"),
        dict.fromkeys("bc", f"ask{TEXT}0123"),
        {"c": f"ask{TEXT}012345"},
    ]
    assert [uids for _, _, uids in trainer.replay_buffer.sampled] == [
        list("abcd"), list("bcd"), list("bc"), ["c"],
    ]  # fmt: skip
    assert sorted(batch.keys) == sorted(trainer.stored)
    assert len(batch) == 8
    assert [tag["of"] for tag in batch.tags] == list(batch.keys)
    assert batch.partition_id == "train"
    # One of b and d each, by the hints of a half and of a quarter.
    assert [sum(trainer.stored[f"{uid}_1_0"]) for uid in "abcd"] == [1, 1, 0, 1]
    assert len(trainer.cleared) == 2 * (3 + 2 + 1)
    assert metrics == {
        "verl": 1, "hpo/failed_group_fraction": 0.75, "hpo/hinted_group_fraction": 0.75,
        "hpo/hint_success_fraction": pytest.approx(2 / 3), "hpo/hint_too_long_fraction": 0.0,
    }  # fmt: skip


def test_without_a_failure_nothing_is_asked_again(make):
    trainer = make()
    batch, metrics = submit(trainer, ("a", "ask", "01"), ("b", "ask", "01"))
    assert len(trainer.asked) == 1
    assert len(batch) == 4
    assert {key for key, value in metrics.items() if value} == {"verl"}


def test_without_a_solution_or_room_a_group_stays(make):
    trainer = make(hints={"text": "|"}, **{"data.max_prompt_length": 9})
    batch, metrics = submit(trainer, ("a", "z", ""), ("b", "z", "0123456789"), ("c", "z", "0123"))
    # round(.25 * 10) = 2 letters and 4 before fit, round(5.) = 5 just fit, 8 do not.
    assert trainer.asked[1:] == [
        {"b": "ask|01", "c": "ask|0"}, {"b": "ask|01234", "c": "ask|01"}, {"c": "ask|012"},
    ]  # fmt: skip
    assert len(batch) == 6
    assert metrics["hpo/failed_group_fraction"] == 1
    assert metrics["hpo/hinted_group_fraction"] == pytest.approx(2 / 3)
    assert metrics["hpo/hint_too_long_fraction"] == pytest.approx(1 / 3)
    assert metrics["hpo/hint_success_fraction"] == 0


def test_the_first_steps_have_no_hints(make):
    for after, times in ((7, 1), (6, 4)):
        trainer = make(hints={"after_step": after})
        _, metrics = submit(trainer, ("a", "z", "01234567"))
        assert len(trainer.asked) == times
        assert metrics["hpo/failed_group_fraction"] == 1


def test_validations_and_runs_without_hints_are_verls(make):
    trainer = make()
    trainer.replay_buffer.submitted = ["v"]
    batch, metrics = trainer.replay_buffer.sample(7, "val", 1)
    assert (batch.partition_id, metrics) == ("val", {"verl": 1})
    plain = make(hints={"enable": False})
    assert submit(plain, ("a", "z", "01"))[1] == {"verl": 1}


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"enable": "yes"}, r"hints\.enable = 'yes': must be true or false"),
        ({"by": ""}, r"hints\.by = '': must be a text"),
        ({"text": 3}, r"hints\.text = 3: must be a text"),
        ({"shares": []}, r"shares = \[\]: must rise, and end below 1"),
        ({"shares": [0.5, 0.25]}, r"must rise, and end below 1"),
        ({"shares": [0.5, 0.5]}, r"must rise"),
        ({"shares": [0.5, 1.0]}, r"must rise, and end below 1"),
        ({"shares": [0.0]}, r"shares = 0\.0: must be a number in \(0, 1\]"),
        ({"after_step": -1}, r"after_step = -1: must be a number in \[0, inf\)"),
        ({"share": [0.5]}, r"did you mean actor_rollout_ref\.rollout\.custom\.hints\.shares\?"),
    ],
)
def test_bad_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        hint_settings(config(values))


def test_the_defaults_are_the_papers():
    assert HintSettings().shares == (0.25, 0.5, 0.75)
    assert not HintSettings().enable
    assert list(hint_settings(config({"shares": [0.1]})).shares) == [0.1]


def test_what_does_not_go_with_asking_again_is_refused():
    check_sampling(config())
    for mode in ("sync", "hpo_separate_async", "hpo_colocate_async"):
        with pytest.raises(ConfigError, match=rf"trainer_mode = '{mode}': .* needs hpo_sync$"):
            check_sampling(config(mode=mode))
        check_sampling(config({"enable": False}, mode=mode))
    for key in (
        "algorithm.filter_groups.enable",
        "trainer.v1.sampler.sync_refill_failed_groups",
        "reward.reward_model.enable",
        "actor_rollout_ref.rollout.custom.knapsack.enable",
    ):
        with pytest.raises(ConfigError, match=rf"^{key} = True: must be false with actor_"):
            check_sampling(config(**{key: True}))
    model = {"reward.reward_model": {"enable": True, "enable_resource_pool": True}}
    check_sampling(config(**model))
    with pytest.raises(ConfigError, match=r"rollout\.n = 1: must be at least 2 with"):
        check_sampling(config(**{"actor_rollout_ref.rollout.n": 1}))
