"""Whatever a run loads of a model is a folder here, whole and without code."""

import re

import pytest
from model_folders import make_model
from omegaconf import OmegaConf

from hpo_verl.checks.loaded import check_model_code, check_policy, other_faults
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.settings import policy_folder
from hpo_verl.errors import DataError

HUB = "Qwen/Qwen2.5-1.5B-Instruct"
OTHERS = [
    "actor_rollout_ref.model.tokenizer_path",
    "actor_rollout_ref.model.hf_config_path",
    "actor_rollout_ref.model.lora_adapter_path",
    "actor_rollout_ref.model.lora.adapter_path",
    "reward.reward_model.model_path",
    "distillation.teacher_models.teacher_model.model_path",
]


@pytest.fixture
def config(tmp_path):
    folder = make_model(tmp_path / "model")
    policy = {
        "module": "data_prep.policies.tiny",
        "output": str(folder),
        "arguments": {"seed": 3},
    }
    return OmegaConf.create(
        {
            "actor_rollout_ref": {"model": {"path": str(folder), "tokenizer_path": None}},
            "critic": {"model": {"path": "~/models/deepseek-llm-7b-chat"}},
            "algorithm": {"adv_estimator": "a_hpo"},
            "prepare": {"policy": policy},
        }
    )


def refused(config, message):
    (fault,) = other_faults(config)
    assert re.search(message, fault)


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_truncated_weights(config, tmp_path, cut):
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        check_policy(policy_folder(config))


@pytest.mark.parametrize("key", OTHERS)
def test_so_is_one_under_every_other_key_that_verl_loads_from(config, tmp_path, key):
    assert list(other_faults(config)) == []
    OmegaConf.update(config, key, HUB)
    refused(config, f"{key}: {HUB} is not a folder; .*fetched at a commit")
    OmegaConf.update(config, key, str(tmp_path / "model"))
    assert list(other_faults(config)) == []
    check_model_code(PlannedRun("any", (), tmp_path, composed=config))
    other = make_model(tmp_path / "other")
    OmegaConf.update(config, key, str(other))
    (other / "own.py").write_text("")
    with pytest.raises(DataError, match=f"{key}: .*holds code, own.py"):
        check_model_code(PlannedRun("any", (), tmp_path, composed=config))


def test_weights_in_pickles(config, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(b"")
    config.actor_rollout_ref.model.lora_adapter_path = str(adapter)
    refused(config, "holds adapter_model.bin; weights must be safetensors")
    # Beside safetensors nobody reads it.
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert list(other_faults(config)) == []


def test_a_critic_is_looked_at_where_there_is_one(config):
    config.algorithm.adv_estimator = "gae"
    refused(config, r"critic\.model\.path: .*deepseek-llm-7b-chat is not a folder")
    config.algorithm.adv_estimator = "grpo"
    assert list(other_faults(config)) == []
    config.critic.enable = True
    refused(config, r"critic\.model\.path")
