"""One step of a trainer of ours around a stand-in for verl's, without TransferQueue."""

import uuid
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.utils import tensordict_utils as tu

from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.trainer.algorithm_step import AlgorithmStep

LENGTHS = torch.tensor([2, 4, 6, 8, 3, 3, 1])
# Four responses of one prompt, two of another, one padding row.
MASK = torch.arange(8) < torch.tensor([2, 4, 6, 8, 3, 3, 0])[:, None]
UIDS = np.array([*"aaaabb", f"pad{uuid.uuid4().hex}"], dtype=object)
REWARDS = (1.0, 0.0, 0.0, 0.0, 0.7, 0.7, 0.0)
ENTROPY = torch.rand(7, 8, generator=torch.Generator().manual_seed(0))


def nested(values):
    rows = [row[: int(length)] for row, length in zip(values, LENGTHS, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def config(estimator="a_hpo", loss="hpo", policy_loss=None, **algorithm):
    section = {"adv_estimator": estimator, "use_kl_in_reward": False, **algorithm}
    return OmegaConf.create(
        {
            "algorithm": section,
            "actor_rollout_ref": {
                "actor": {"policy_loss": {"loss_mode": loss, **(policy_loss or {})}}
            },
        }
    )


class Parent:
    """verl's trainer as far as needed: calls the estimator, and stores what it returns.

    Attributes:
        store: Fields of TransferQueue, nested.
        mask: The estimator's; a rollout correction may have masked tokens.
        penalty: Taken off the rewards, as a KL penalty is.
    """

    def _compute_advantage(self, batch, metrics):
        metrics["parent"] = 1
        self.provided = {name: extras.get(name) for name in ("entropy", "progress")}
        section = self.config.algorithm
        rewards = self.store["rm_scores"].to_padded_tensor(0.0) - self.penalty * MASK
        advantages, _ = get_adv_estimator_fn(section.adv_estimator)(
            token_level_rewards=rewards,
            response_mask=self.mask.long(),
            config=section,
            index=UIDS,
        )
        self.store["advantages"] = nested(advantages)
        self.store["token_level_rewards"] = nested(rewards)
        return batch


@pytest.fixture
def step(monkeypatch):
    """Run one step; gives trainer, metrics, and the fields that were fetched, call by call."""
    scores = torch.zeros(7, 8)
    ends = torch.tensor([1, 3, 5, 7, 2, 2, 0])

    def run(
        configuration, rewards=REWARDS, mask=MASK, penalty=0.0, at=(1, 1), parts=(0, 1, ()),
        memory=None, extra_fields=(),
    ):  # fmt: skip
        scores[torch.arange(7), ends] = torch.tensor(rewards)
        fields = {
            "response_mask": nested(mask.long()),
            "rm_scores": nested(scores),
            "entropy": nested(ENTROPY),
            "old_log_probs": nested(-2.0 * ENTROPY),
        }
        fetched = []

        def kv_batch_get(keys, partition_id, select_fields):
            fetched.append([*select_fields])
            found = {key: fields[key] for key in select_fields if key in fields}
            if "extra_fields" in select_fields:
                found["extra_fields"] = np.array([*extra_fields], dtype=object)
            if "uid" in select_fields:
                found["uid"] = UIDS.tolist()
            return tu.get_tensordict(found)

        def kv_batch_put(keys, partition_id, fields):
            trainer.store.update(fields.items())
            return batch

        monkeypatch.setattr("transfer_queue.kv_batch_get", kv_batch_get)
        monkeypatch.setattr("transfer_queue.kv_batch_put", kv_batch_put)
        trainer = object.__new__(type("Mode", (AlgorithmStep, Parent), {}))
        trainer.config, trainer.store, trainer.mask = configuration, fields, mask
        trainer.penalty = penalty
        trainer.global_steps, trainer.total_training_steps = at
        trainer.local_trigger_step, trainer.parameter_sync_step, earlier = parts
        trainer._earlier = deque(earlier, maxlen=trainer.parameter_sync_step - 1)
        trainer._counts, trainer.memory = Counter(), memory or {}
        keys = [f"{uid}_{row}_0" for row, uid in enumerate(UIDS)]
        batch, metrics = SimpleNamespace(keys=keys, partition_id="train"), {}
        assert trainer._compute_advantage(batch, metrics) is batch
        assert metrics.pop("parent") == 1
        assert all(extras.get(name) is None for name in ("entropy", "progress", "report"))
        return trainer, metrics, fetched

    return run


def submitted(configuration, memory):
    """The batch of prompts that reaches verl's trainer."""
    seen = []

    class Parent:
        def _submit_batch_to_rollout(self, batch):
            seen.append(batch)
            return len(batch)

    trainer = object.__new__(type("Mode", (AlgorithmStep, Parent), {}))
    trainer.config, trainer.memory = configuration, memory
    assert trainer._submit_batch_to_rollout(tu.get_tensordict({"a": torch.zeros(3)})) == 3
    return seen[0]
