"""LoRA's settings that verl reads in different places, and the memory that an adapter takes."""

from dataclasses import replace
from math import isclose

import pytest
from findings import only
from model_sizes import MODEL_SIZES

from hpo_verl.checks.adapter import check_adapter
from hpo_verl.checks.list import CHECKS, run_checks
from hpo_verl.checks.machine import Card, Node, check_machines
from hpo_verl.checks.memory import GIB, adapter_parameters, card_memory, host_memory
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.storage import check_disk

MODEL, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.rollout"
RANK = {f"{MODEL}.lora_rank": 16}
APART = RANK | {f"{MODEL}.lora.merge": False}
SIZE = MODEL_SIZES["Qwen/Qwen2.5-1.5B-Instruct"]
# 16 x 28 layers x (twice 1536 + 1536, twice 1536 + 256 and three times 1536 + 8960).
ADAPTER = 16 * 28 * (2 * 3072 + 2 * 1792 + 3 * 10_496)


@pytest.fixture
def small(planned):
    def build(changes=None):
        return planned(changes, recipe="countdown3-1.5b", hardware="1gpu24").config

    return build


def test_without_an_adapter_there_is_nothing_to_say(planned):
    assert check_adapter(planned()) == []


def test_the_recipes_add_the_adapter_into_the_weights(planned):
    (finding,) = check_adapter(planned(RANK))
    assert (finding.status, finding.detail) == (
        "ok",
        "rank 16, alpha 16; the rollout gets the sum of weights and adapter",
    )


@pytest.mark.parametrize(
    ("changes", "hardware", "shown", "fix"),
    [
        ({f"{MODEL}.lora.rank": 16}, "8gpu", "is Megatron's", "lora_rank=16"),
        ({f"{MODEL}.lora_adapter_path": "/a"}, "8gpu", "lora_rank is 0", "that of the adapter"),
        (APART, "cpu", "the rollout hf takes whole weights only", "lora.merge=true"),
        (APART, "8gpu", "load_format=dummy", "load_format=safetensors"),
        (APART | {f"{MODEL}.lora_rank": 513}, "8gpu", "at most 512", "a smaller one"),
        (
            RANK | {"actor_rollout_ref.actor.checkpoint.save_lora_only": True},
            "8gpu",
            "save_lora_only=true",
            "false",
        ),
    ],
)
def test_what_would_fail_or_train_something_else(planned, changes, hardware, shown, fix):
    recipe = "countdown-tiny" if hardware == "cpu" else "countdown3-1.5b"
    run = planned(changes, recipe=recipe, hardware=hardware)
    finding = only(run_checks(run, [c for c in CHECKS if c.name == "adapter"]), "adapter")
    assert finding.status == "error"
    assert shown in finding.detail
    assert fix in finding.fix


def test_vllm_takes_an_adapter_apart_from_weights_that_it_reads_itself(planned):
    changes = APART | {f"{ROLLOUT}.load_format": "safetensors"}
    (finding,) = check_adapter(planned(changes, recipe="countdown3-1.5b", hardware="8gpu"))
    assert (finding.status, "apart from the weights" in finding.detail) == ("ok", True)


@pytest.mark.parametrize(("key", "value"), [("lora_rank", -1), ("lora_alpha", 0)])
def test_ranges(planned, key, value):
    run = planned(RANK | {f"{MODEL}.{key}": value})
    finding = only(run_checks(run, [c for c in CHECKS if c.name == "settings"]), "settings")
    assert (finding.status, f"{MODEL}.{key}={value}" in finding.detail) == ("error", True)


def test_parameters_of_an_adapter(small):
    assert adapter_parameters(SIZE, small()) == ADAPTER
    some = small({f"{MODEL}.target_modules": ["q_proj", "v_proj"], f"{MODEL}.lora_rank": 8})
    assert adapter_parameters(SIZE, some) == 8 * 28 * (3072 + 1792)


def test_frozen_weights_have_neither_gradients_nor_moments(small):
    config = small()
    memory = card_memory(SIZE, config, 24.0)
    assert isclose(memory.weights, 4 * (SIZE.parameters + ADAPTER) / GIB)
    # The first layer's input and its gradient are kept, too.
    assert isclose(memory.gradients, (4 * ADAPTER + 4 * 16_384 * 1536) / GIB)
    assert (isclose(memory.adam, 8 * ADAPTER / GIB), isclose(memory.step, 4 * ADAPTER / GIB)) == (
        True,
        True,
    )
    assert isclose(memory.resident, memory.weights + memory.adam)
    whole = card_memory(SIZE, small({f"{MODEL}.lora_rank": 0}), 24.0)
    assert whole.gradients > 10 * memory.gradients
    assert (whole.loss > memory.loss, whole.layer > memory.layer) == (True, True)
    half = card_memory(SIZE, small({"actor_rollout_ref.actor.fsdp_config.model_dtype": "bf16"}), 24)
    assert isclose(half.weights, memory.weights / 2)


def test_the_host_keeps_a_copy_while_weights_and_adapter_are_added(small):
    offload = {"actor_rollout_ref.actor.fsdp_config.param_offload": True}
    needed, _ = host_memory(SIZE, small(offload))
    assert isclose(needed, (8 * SIZE.parameters + 4 * ADAPTER) / GIB)
    apart = offload | {f"{MODEL}.lora.merge": False}
    # A sleeping vLLM keeps its own in bfloat16.
    assert isclose(host_memory(SIZE, small(apart))[0], (6 * SIZE.parameters + 4 * ADAPTER) / GIB)


def test_the_host_of_a_run_on_the_cpu(planned):
    needed, text = host_memory(SIZE, planned(RANK).config)
    everything, _ = host_memory(SIZE, planned().config)
    # Neither gradients nor moments of the frozen weights.
    assert needed < everything - 11 * SIZE.parameters / GIB + 16 * ADAPTER / GIB
    assert "4 A = 0.1" in text


def test_a_small_card_and_the_way_to_use_it(planned, monkeypatch):
    monkeypatch.setattr(PlannedRun, "size", SIZE)
    node = Node((Card("NVIDIA GeForce RTX 4090", 23.99, 0.0),), 32, 60.0)

    def look(hardware):
        run = planned(recipe="countdown3-1.5b", hardware=hardware)
        return only(check_machines(run, [node]), "card memory")

    fits, whole = look("1gpu24"), look("1gpu")
    assert fits.status == "ok"
    assert f"{ADAPTER:,} parameters of an adapter are trained, the others frozen" in fits.detail
    assert (whole.status, whole.fix) == ("error", f"{MODEL}.lora_rank=16")


def test_checkpoints_hold_moments_of_the_adapter_alone(planned, monkeypatch):
    monkeypatch.setattr(PlannedRun, "size", replace(SIZE))
    finding = check_disk(planned(recipe="countdown3-1.5b", hardware="1gpu24"))
    each = (4 * (SIZE.parameters + ADAPTER) + 8 * ADAPTER) / GIB
    assert f"(3 x {each:.2f} GiB)" in finding.detail
