"""Whatever a run loads of a model is a folder here, whole and without code."""

import pytest
from model_folders import make_model
from omegaconf import OmegaConf

from hpo_verl.checks.model_folders import check_model, check_no_code, check_other_models
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
    with pytest.raises(DataError, match=message):
        check_other_models(config)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder(config, tmp_path, name):
    check_model(config)
    (tmp_path / "model" / name).unlink()
    with pytest.raises(DataError, match="model holds no "):
        check_model(config)


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_truncated_weights(config, tmp_path, cut):
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        check_model(config)


def test_a_name_on_the_hub_is_refused_since_it_names_no_commit(config):
    config.actor_rollout_ref.model.path = HUB
    with pytest.raises(DataError, match=r"Instruct is not a folder; .*fetched at a commit: python"):
        check_model(config)


@pytest.mark.parametrize("key", OTHERS)
def test_so_is_one_under_every_other_key_that_verl_loads_from(config, tmp_path, key):
    check_other_models(config)
    OmegaConf.update(config, key, HUB)
    refused(config, f"{key}: {HUB} is not a folder; .*fetched at a commit")
    OmegaConf.update(config, key, str(tmp_path / "model"))
    check_other_models(config)
    check_no_code(config)
    other = make_model(tmp_path / "other")
    OmegaConf.update(config, key, str(other))
    (other / "own.py").write_text("")
    with pytest.raises(DataError, match=f"{key}: .*holds code, own.py"):
        check_no_code(config)


def test_weights_in_pickles(config, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(b"")
    config.actor_rollout_ref.model.lora_adapter_path = str(adapter)
    refused(config, "holds adapter_model.bin; weights must be safetensors")
    # Beside safetensors nobody reads it.
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    check_other_models(config)


def test_a_critic_is_looked_at_where_there_is_one(config):
    config.algorithm.adv_estimator = "gae"
    refused(config, r"critic\.model\.path: .*deepseek-llm-7b-chat is not a folder")
    config.algorithm.adv_estimator = "grpo"
    check_other_models(config)
    config.critic.enable = True
    refused(config, r"critic\.model\.path")
