"""The policy of a LoRA run is the sum of weights and adapter, in a folder like any other."""

import json

import pytest
import torch
from lab_policies import random_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.errors import DataError
from hpo_verl.launch.outputs import export


def checkpoint(actor, alpha):
    """As verl's FSDP engine leaves it; base model and adapter, with matrices that are not 0."""
    base = random_model(len(build_tokenizer()), seed=1)
    base.config.architectures = ["Qwen2ForCausalLM"]
    base.config.save_pretrained(actor / "huggingface")
    build_tokenizer().save_pretrained(actor / "huggingface")
    torch.manual_seed(2)
    settings = LoraConfig(
        r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, settings)
    torch.save(dict(model.state_dict()), actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    meta = {"r": 4, "lora_alpha": alpha, "task_type": "CAUSAL_LM"}
    (actor / "lora_train_meta.json").write_text(json.dumps(meta))
    return model


def test_weights_and_adapter_are_added(tmp_path):
    model = checkpoint(tmp_path / "actor", alpha=16)
    export(tmp_path / "actor", tmp_path / "out")
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.bfloat16
    before = {name: tensor.clone() for name, tensor in model.get_base_model().named_parameters()}
    expected = model.merge_and_unload().state_dict()
    changed = 0
    for name, tensor in exported.state_dict().items():
        # Weights and their sum are rounded to bfloat16, whose rounding is 2^-8.
        bound = 2**-7 * float(expected[name].abs().max())
        torch.testing.assert_close(tensor.float(), expected[name], atol=bound, rtol=0)
        old = before.get(name.replace(".weight", ".base_layer.weight"))
        changed += old is not None and not torch.allclose(old, expected[name], atol=0.02)
    assert changed


def test_an_adapter_of_unknown_scale_is_refused(tmp_path):
    checkpoint(tmp_path / "actor", alpha=0)
    with pytest.raises(DataError, match="lora_alpha"):
        export(tmp_path / "actor", tmp_path / "out")
    assert not (tmp_path / "out").exists()
