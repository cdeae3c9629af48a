"""The part of a trainer that serves a history of prompts, SPO's.

The trainer stands between stand-ins for verl's trainer, actor and TransferQueue.
"""

import json
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.utils import tensordict_utils as tu

from hpo_verl.algorithms.spo import SPOSettings
from hpo_verl.errors import DataError
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep
from hpo_verl.verl_plugin.trainer.prompt_history import (
    PARTITION,
)
from hpo_verl.verl_plugin.trainer.prompts import ROW


def nested(rows):
    return torch.nested.as_nested_tensor(
        [torch.as_tensor(row) for row in rows], layout=torch.jagged
    )


class Queue(dict):
    """TransferQueue as far as it is used here: (partition, key) -> fields of a sample."""

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        columns = {name: column.unbind() for name, column in fields.items()}
        for i, key in enumerate(keys):
            self.setdefault((partition_id, key), {}).update(
                {name: column[i] for name, column in columns.items()}
            )

    def kv_batch_get(self, keys, partition_id, select_fields):
        samples = [self[partition_id, key] for key in keys]
        fields = {}
        for name in select_fields:
            column = [sample[name] for sample in samples]
            fields[name] = column if isinstance(column[0], str) else nested(column)
        return tu.get_tensordict(fields)

    def kv_clear(self, keys, partition_id):
        for key in keys:
            del self[partition_id, key]


class Policy:
    """Log-probability of every token is `level`."""

    def __init__(self, queue):
        self.queue, self.level, self.scored = queue, -1.0, []

    def compute_log_prob(self, batch):
        assert batch.extra_info["compute_loss"] is False
        assert batch.extra_info["temperature"] == 0.7
        for key in batch.keys:
            sample = self.queue[batch.partition_id, key]
            assert set(sample) == set(batch.fields)
            self.scored.append(sample["input_ids"].tolist())
            sample["log_probs"] = torch.full((len(sample["input_ids"]),), self.level)
        return batch


class Parent:
    """What verl's trainer does around the parts tested here."""

    def _init_dataloader(self):
        self.train_dataset = [
            {"raw_prompt": [{"role": "user", "content": f"p{i}"}], "dummy_tensor": torch.zeros(1)}
            for i in range(8)
        ]
        self.train_dataloader = "verl's"

    def _submit_batch_to_rollout(self, batch):
        assert ROW not in batch
        return len(batch)

    def _compute_advantage(self, batch, metrics):
        name = self.config.algorithm.adv_estimator
        if name == "spo":
            self.provided = extras.get("values")
            fields = ["uid", "response_mask", "rm_scores"]
            data = self.queue.kv_batch_get(batch.keys, batch.partition_id, fields)
            uids = data.pop("uid").tolist()
            get_adv_estimator_fn(name)(
                token_level_rewards=data["rm_scores"].to_padded_tensor(0.0),
                response_mask=data["response_mask"].to_padded_tensor(0),
                config=self.config.algorithm,
                index=uids,
            )
        return batch


@pytest.fixture
def trainer(monkeypatch):
    queue = Queue()
    for name in ("kv_batch_put", "kv_batch_get", "kv_clear"):
        monkeypatch.setattr(f"transfer_queue.{name}", getattr(queue, name))
    result = type("Mode", (AlgorithmStep, Parent), {})
    result = result.__new__(result)
    result.parameter_sync_step, result.local_trigger_step, result._earlier = 1, 0, deque(maxlen=0)
    result.memory = {}
    result.config = OmegaConf.create(
        {
            "algorithm": {
                "adv_estimator": "spo",
                "use_kl_in_reward": False,
                "spo": {"drift_half": 1.0, "rho_min": 0.25},
            },
            "actor_rollout_ref": {
                "rollout": {"temperature": 0.7},
                "actor": {"policy_loss": {"loss_mode": "vanilla"}},
            },
            "data": {"train_batch_size": 3, "seed": 0},
        }
    )
    result.queue = queue
    result.actor_rollout_wg = Policy(queue)
    result._init_dataloader()
    return result


def submit(trainer, uids):
    """Draw a batch and hand it to the rollout; returns the prompts' rows."""
    batch = tu.get_tensordict(next(iter(trainer.train_dataloader)))
    rows = list(batch[ROW])
    assert [prompt[0]["content"] for prompt in batch["raw_prompt"]] == [f"p{row}" for row in rows]
    tu.assign_non_tensor_stack(batch, "uid", uids)
    assert trainer._submit_batch_to_rollout(batch) == 3
    return rows


def answer(trainer, uids, rewards, padding=True):
    """Put responses of 1, 2, 3 tokens into the queue, and a padding row."""
    keys = []
    for i, (uid, reward) in enumerate(zip(uids, rewards, strict=True)):
        length, key = i % 3 + 1, f"{uid}_0_{i}"
        trainer.queue["train", key] = {
            "uid": uid,
            "prompts": torch.tensor([40 + i, 41]),
            "responses": torch.arange(length),
            "response_mask": torch.ones(length, dtype=torch.int64),
            "rm_scores": torch.tensor([0.0] * (length - 1) + [reward]),
            "old_log_probs": torch.full((length,), trainer.actor_rollout_wg.level),
        }
        keys.append(key)
    if padding:
        trainer.queue["train", "pad_0_0"] = {
            "uid": "pad", "prompts": torch.tensor([0]), "responses": torch.tensor([0]),
            "response_mask": torch.tensor([0]), "rm_scores": torch.tensor([0.0]),
            "old_log_probs": torch.tensor([0.0]),
        }  # fmt: skip
        keys.append("pad_0_0")
    return SimpleNamespace(keys=keys, partition_id="train")


def test_a_step_lends_values_of_before_and_then_counts_the_rewards(trainer):
    rows = submit(trainer, ["u", "v", "w"])
    metrics, batch = {}, answer(trainer, ["u", "v", "w"], [1.0, 0.0, 1.0])
    assert trainer._compute_advantage(batch, metrics) is batch
    assert trainer.provided == {"u": 0.5, "v": 0.5, "w": 0.5}
    # A first visit is no drift: rho = rho_max = .96.
    tracker = trainer._sampler.history
    assert tracker.alpha[rows].tolist() == pytest.approx([1.48, 0.48, 1.48])
    assert tracker.beta[rows].tolist() == pytest.approx([0.48, 1.48, 0.48])
    others = [row for row in range(8) if row not in rows]
    assert (tracker.alpha[others] == 0.5).all()
    assert {key: value for key, value in metrics.items() if "spo_" in key} == {
        "hpo/spo_value": 0.5, "hpo/spo_forgetting": pytest.approx(0.96),
        "hpo/spo_drift": 0.0, "hpo/spo_revisited_fraction": 0.0,
    }  # fmt: skip
    assert trainer.actor_rollout_wg.scored == []
    assert sorted(trainer._sampler.last) == sorted(rows)


def test_a_prompt_that_comes_back_is_scored_again_and_forgets_by_the_drift(trainer):
    tracker, policy = trainer._sampler.history, trainer.actor_rollout_wg
    trainer._rows = {"u": 5, "v": 2, "w": 7}
    trainer._compute_advantage(answer(trainer, ["u", "v", "w"], [1.0, 0.0, 1.0]), {})
    assert trainer._rows == {}
    policy.level = -1.5
    trainer._rows, metrics = {"x": 2, "y": 0, "z": 7}, {}
    trainer._compute_advantage(answer(trainer, ["x", "y", "z"], [1.0, 1.0, 0.0]), metrics)
    # The responses of before, of two and three tokens; the shorter again up to four rows.
    first, second = [41, 41, 0, 1], [42, 41, 0, 1, 2]
    assert policy.scored == [first, second, first, first]
    assert trainer.provided["x"] == pytest.approx(0.48 / 1.96)
    # D = .5: rho = 2^-.5; prompt 0 is new: .96.
    rho = 2**-0.5
    assert tracker.alpha[[2, 0, 7]].tolist() == pytest.approx([rho * 0.48 + 1, 1.48, rho * 1.48])
    assert tracker.beta[[2, 0, 7]].tolist() == pytest.approx([rho * 1.48, 0.48, rho * 0.48 + 1])
    assert metrics["hpo/spo_drift"] == pytest.approx(1 / 3)
    assert metrics["hpo/spo_revisited_fraction"] == pytest.approx(2 / 3)
    assert metrics["hpo/spo_forgetting"] == pytest.approx((2 * rho + 0.96) / 3)
    assert not [key for key in trainer.queue if key[0] == PARTITION]
    # Their last responses are now these.
    assert trainer._sampler.last[2].log_prob.tolist() == [-1.5]
    assert trainer._sampler.last[7].response.tolist() == [0, 1, 2]
    assert trainer._sampler.last[5].log_prob.tolist() == [-1.0]
    # No view of the step's column, which would stay in memory as long as the response.
    for part in trainer._sampler.last[7]:
        assert part.untyped_storage().nbytes() == part.nbytes


def test_masked_tokens_do_not_drift(trainer):
    trainer._rows = {"a": 3}
    batch = answer(trainer, ["a", "b", "c"][:1], [1.0], padding=False)
    sample = trainer.queue["train", batch.keys[0]]
    sample.update(
        responses=torch.arange(3), response_mask=torch.tensor([1, 0, 1]),
        rm_scores=torch.tensor([0.0, 0, 1]), old_log_probs=torch.tensor([-1.25, 9.0, -1.0]),
    )  # fmt: skip
    trainer._compute_advantage(batch, {})
    trainer._rows, metrics = {"b": 3}, {}
    trainer._compute_advantage(answer(trainer, ["b"], [1.0]), metrics)
    assert metrics["hpo/spo_drift"] == pytest.approx(0.125)


def test_constant_forgetting_scores_and_keeps_nothing(trainer):
    trainer.config.algorithm.spo.rho_max = 0.25
    trainer._init_dataloader()
    for uid in ("a", "b"):
        trainer._rows, metrics = {uid: 3}, {}
        trainer._compute_advantage(answer(trainer, [uid], [1.0]), metrics)
    assert trainer.actor_rollout_wg.scored == []
    assert trainer._sampler.last == {}
    assert trainer._sampler.history.alpha[3] == 0.25 * (0.25 * 0.5 + 1) + 1
    assert {key for key in metrics if "spo_" in key} == {"hpo/spo_value", "hpo/spo_forgetting"}
    assert metrics["hpo/spo_forgetting"] == 0.25


def test_two_responses_of_one_prompt_are_refused_and_count_for_nothing(trainer):
    trainer._rows = {"a": 3, "b": 3}
    with pytest.raises(DataError, match=r"^spo: row 3 of the training set has 2 responses"):
        trainer._compute_advantage(answer(trainer, ["a", "b"], [1.0, 0.0]), {})
    assert (trainer._sampler.history.alpha == 0.5).all()


def test_offline_rewards_reach_the_tracker(trainer, tmp_path):
    file = tmp_path / "rewards.json"
    file.write_text(json.dumps([[1, 0, 1], *[[]] * 7]))
    trainer.config.algorithm.spo.initial_rewards = str(file)
    trainer._init_dataloader()
    assert trainer._sampler.history.values()[0].item() == pytest.approx(2.5 / 4)
    file.write_text("[[1]]")
    with pytest.raises(DataError, match="1 lists for 8 prompts"):
        trainer._init_dataloader()


def test_the_loader_reads_nothing_ahead(trainer):
    assert trainer.train_dataloader.num_workers == 0
    first, tracker = submit(trainer, ["a", "b", "c"]), trainer._sampler.history
    assert len(set(first)) == 3
    tracker.settings = SPOSettings(exploration=1e-9)
    tracker.alpha = torch.full((8,), 1e-14, dtype=torch.float64)
    tracker.alpha[[0, 4, 6]] = 0.5
    assert sorted(submit(trainer, ["d", "e", "f"])) == [0, 4, 6]
    assert set(trainer._rows) == set("abcdef")


def test_another_estimator_leaves_the_trainer_alone(trainer):
    trainer.config.algorithm.adv_estimator = "grpo"
    trainer._init_dataloader()
    assert trainer.train_dataloader == "verl's"
    plain = tu.get_tensordict({"uid": np.array(["a"], dtype=object), "x": torch.zeros(1)})
    assert trainer._submit_batch_to_rollout(plain) == 1
