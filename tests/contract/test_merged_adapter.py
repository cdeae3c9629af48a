"""What verl's engine, extended by ours, sends to a rollout of a policy with a LoRA adapter."""

import pytest
import torch
from engine_ranks import free_port, run_ranks, save_tiny_model
from transformers import AutoModelForCausalLM

RANK, ALPHA = 4, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_tiny_model(folder)
    run_ranks("merged_adapter_worker.py", folder, free_port())
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    # Written by the worker, in a folder of this test.
    return torch.load(folder / "merged.pt", weights_only=True)


def test_an_update_changes_the_adapter_alone(seen):
    before = seen["before"]
    changed = {name for name, now in seen["after"].items() if not torch.equal(now, before[name])}
    assert any("lora_B" in name for name in changed)
    assert all("lora_" in name for name in changed)


def test_the_rollout_gets_the_sum_of_weights_and_adapter_in_float32(seen, folder):
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    prefix = "base_model.model."
    moved = 0
    for name, left in seen["after"].items():
        if "lora_A" in name:
            right = seen["after"][name.replace("lora_A", "lora_B")]
            weight = name.removeprefix(prefix).replace(".lora_A.default", "")
            expected[weight] = expected[weight] + ALPHA / RANK * right @ left
            moved += 1
    assert moved == 7
    assert set(seen["sent"]) == set(expected)
    for name, tensor in seen["sent"].items():
        assert tensor.dtype == torch.float32
        # Bfloat16 would be 2^-8 off.
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_sending_leaves_weights_and_adapter_as_they_are(seen):
    assert set(seen["end"]) == set(seen["after"])
    assert all(torch.equal(tensor, seen["after"][name]) for name, tensor in seen["end"].items())
