import copy
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer import config as verl_config
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils as tu

from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.trainer import modes as trainers

CONFIG = {
    "algorithm": {"adv_estimator": "a_hpo", "use_kl_in_reward": False, "hpo": {"alpha_min": 0.1}},
    "actor_rollout_ref": {
        "actor": {
            "policy_loss": {"loss_mode": "hpo"},
            "loss_agg_mode": "token-mean",
            "clip_ratio": 0.2,
            "clip_ratio_low": 0.2,
            "clip_ratio_high": 0.2,
        }
    },
    "trainer": {"v1": {"trainer_mode": "hpo_sync"}},
}
HPO_KEYS = {
    "hpo/alpha", "hpo/positive_fraction", "hpo/negative_fraction",
    "hpo/zero_spread_group_fraction", "hpo/solve_rate", "hpo/response_length_positive",
    "hpo/response_length_negative", "hpo/advantage_mass_negative_over_positive",
    "hpo/advantage_mass_negative_over_positive_before_weighting",
}  # fmt: skip


def config(**algorithm):
    result = OmegaConf.create(copy.deepcopy(CONFIG))
    result.algorithm.update(algorithm)
    OmegaConf.set_struct(result, True)
    return result


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_every_mode_extends_its_parent_and_restores_its_name(mode):
    parent, ours = get_trainer_cls(mode), get_trainer_cls(f"hpo_{mode}")
    assert issubclass(ours, trainers.BatchStatistics)
    assert issubclass(ours, parent)
    assert ours.parent_mode == mode
    seen = {}

    class Parent:
        def __init__(self, config):
            seen["mode"] = config.trainer.v1.trainer_mode

    stand_in = type(
        "StandIn", (trainers.BatchStatistics, Parent), {"parent_mode": ours.parent_mode}
    )
    stand_in(config())
    assert seen["mode"] == mode


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_what_verl_builds_by_the_mode_is_what_it_builds_for_the_parent(mode):
    """The replay buffer, its settings and the synchronisation step of the real trainers."""
    with initialize_config_dir(str(Path(verl_config.__file__).parent), version_base=None):
        composed = compose(
            "ppo_trainer",
            overrides=[
                "algorithm.adv_estimator=grpo",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.actor.ppo_mini_batch_size=256",
                "data.train_batch_size=1024",
                "actor_rollout_ref.rollout.nnodes=1",
                "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
                "trainer.v1.separate_async.parameter_sync_step=4",
            ],
        )

    def built(name):
        own = copy.deepcopy(composed)
        own.trainer.v1.trainer_mode = name
        trainer = get_trainer_cls(name)(own)
        buffer = trainer.replay_buffer
        return (
            type(buffer), trainer.trainer_mode, trainer.parameter_sync_step,
            buffer.trainer_mode, buffer.trainer_config, buffer.max_off_policy_strategy,
        )  # fmt: skip

    assert built(f"hpo_{mode}") == built(mode)


def test_registering_twice_changes_nothing():
    before = get_trainer_cls("hpo_sync")
    trainers.register()
    assert get_trainer_cls("hpo_sync") is before


def test_a_bad_configuration_stops_before_the_parent_starts(caplog):
    class Parent:
        def __init__(self, config):
            raise AssertionError("must not be reached")

    mode = type("Mode", (trainers.BatchStatistics, Parent), {"parent_mode": "sync"})
    with pytest.raises(ConfigError, match=r"algorithm\.hpo\.alpha_min = 7"):
        mode(config(hpo={"alpha_min": 7}))


def test_warnings_are_logged(caplog):
    class Parent:
        def __init__(self, config):
            pass

    mode = type("Mode", (trainers.BatchStatistics, Parent), {"parent_mode": "sync"})
    mode(config(use_kl_in_reward=True))
    assert "use_kl_in_reward" in caplog.text


# ---------------------------------------------------------------- batch


def rollout(estimator, rewards=(1.0, 0.0, 0.0, 0.0, 0.7, 0.7, 0.0)):
    """Four responses of one prompt, two of another, one padding row; lengths 2, 4, 6, 8, ..."""
    rewards = torch.tensor(rewards)
    uids = np.array([*"aaaabb", f"pad{uuid.uuid4().hex}"], dtype=object)
    lengths = torch.tensor([2, 4, 6, 8, 3, 3, 0])
    mask = torch.arange(8) < lengths[:, None]
    scores = torch.zeros(7, 8)
    scores[torch.arange(7), (lengths - 1).clamp(min=0)] = rewards
    section = config(adv_estimator=estimator, hpo={}).algorithm
    advantages, _ = get_adv_estimator_fn(estimator)(
        token_level_rewards=scores, response_mask=mask, config=section, index=uids
    )
    return section, uids, scores, scores, mask, advantages


def test_statistics_of_a_batch_with_an_adaptive_weight():
    result = trainers.rollout_statistics(*rollout("a_hpo"))
    assert result == pytest.approx(
        {
            "alpha": 1 / 3,
            "positive_fraction": 1 / 6,
            "negative_fraction": 1 / 2,
            "zero_spread_group_fraction": 1 / 2,
            "solve_rate": 1 / 2,
            "response_length_positive": 2.0,
            "response_length_negative": 6.0,
            # 0.5 * 18 tokens against 1.5 * 2, weighted by a third.
            "advantage_mass_negative_over_positive": 1.0,
            "advantage_mass_negative_over_positive_before_weighting": 3.0,
        },
        rel=1e-6,
    )


def test_statistics_of_verls_grpo_have_weight_one():
    # Rewards whose equal group is exact in float32; verl's grpo invents advantages otherwise.
    result = trainers.rollout_statistics(*rollout("grpo", (1.0, 0, 0, 0, 1.0, 1.0, 0)))
    assert result["alpha"] == 1.0
    assert result["positive_fraction"] == pytest.approx(1 / 6)
    assert result["negative_fraction"] == pytest.approx(1 / 2)
    assert result["zero_spread_group_fraction"] == pytest.approx(1 / 2)
    assert result["advantage_mass_negative_over_positive"] == pytest.approx(3.0, rel=1e-5)
    assert {f"hpo/{key}" for key in result} == HPO_KEYS


def test_the_trainer_adds_them_to_the_metrics_of_the_step(monkeypatch):
    section, uids, scores, _, mask, advantages = rollout("a_hpo")

    def nested(values, lengths):
        rows = [row[: int(length)] for row, length in zip(values, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    lengths = mask.sum(-1).clamp(min=1)
    stored = {
        "response_mask": nested(mask.long(), lengths),
        "rm_scores": nested(scores, lengths),
        "token_level_rewards": nested(scores - 0.125, lengths),
        "advantages": nested(advantages, lengths),
    }
    asked = []

    def kv_batch_get(keys, partition_id, select_fields):
        asked.append(select_fields)
        fields = {key: stored[key] for key in select_fields if key != "uid"}
        data = tu.get_tensordict(fields | {"uid": uids.tolist()})
        assert isinstance(data, TensorDict)
        return data

    monkeypatch.setattr("transfer_queue.kv_batch_get", kv_batch_get)

    class Parent:
        def _compute_advantage(self, batch, metrics):
            metrics["parent"] = 1
            return batch

    mode = type("Mode", (trainers.BatchStatistics, Parent), {"parent_mode": "sync"})
    trainer = mode.__new__(mode)
    trainer.config = OmegaConf.create({"algorithm": section})
    metrics, batch = {}, SimpleNamespace(keys=["k"] * 7, partition_id="train")
    assert trainer._compute_advantage(batch, metrics) is batch
    assert set(metrics) == HPO_KEYS | {"parent"}
    assert metrics["hpo/alpha"] == pytest.approx(1 / 3)
    # With a KL penalty the estimator saw other rewards than the scores.
    trainer.config.algorithm.use_kl_in_reward = True
    trainer._compute_advantage(batch, metrics)
    assert "token_level_rewards" in asked[1]
    assert "token_level_rewards" not in asked[0]
    assert metrics["hpo/solve_rate"] == pytest.approx(1 / 2)
