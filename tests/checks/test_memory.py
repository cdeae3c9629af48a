"""Memory and CPUs by hand-derived numbers; docs/pages/recipes.md has a test of its own."""

from math import isclose

import pytest
from model_sizes import MODEL_SIZES

from hpo_verl.checks.memory import (
    GIB,
    ModelSize,
    card_memory,
    host_memory,
    tokens_at_once,
)

ACTOR = "actor_rollout_ref.actor"
# 2^20 parameters: 2 x 2^8 x 2^6 in the vocabulary's matrices, the rest in two layers.
SMALL = ModelSize(1 << 20, 64, 256, 2, 4, 4, 16, 256, tied=False)
QWEN_7B = MODEL_SIZES["Qwen/Qwen2.5-7B-Instruct"]


@pytest.fixture
def config(planned):
    def build(changes=None, hardware="1gpu"):
        return planned(changes, recipe="countdown3-1.5b", hardware=hardware).config

    return build


def test_every_term_by_hand(config):
    changes = {f"{ACTOR}.ppo_max_token_len_per_gpu": 2048}
    memory = card_memory(SMALL, config(changes), card=10.0)
    mib = 1 / 1024
    assert isclose(memory.weights, 4 * mib)
    assert isclose(memory.gradients, 4 * mib)
    assert isclose(memory.adam, 8 * mib)
    # Half of the parameters outside the matrices are one layer; a matrix has 2^14 values.
    layer = (2**20 - 2**15) / 2
    loss = 2048 * (64 * 2 + 5 * 64 + 256) + 2 * 2**14 + layer
    assert isclose(memory.loss, 2 * loss / GIB)
    # 4 x 256 + 10 x 64 + 2 x 64 values that a layer saves, 2 x 256 + 64 for its gradient.
    work = 2048 * (64 * 2 + 1792 + 576) + 2 * 2**14 + 3 * layer
    assert isclose(memory.layer, 2 * work / GIB)
    assert isclose(memory.step, 4 * mib)
    assert isclose(memory.scoring, (2 + 12) * 2048 * 256 / GIB)
    assert isclose(memory.resident, 12 * mib)
    assert isclose(memory.rollout, 6.0)
    assert isclose(memory.sampling, 10 + 12 * mib)
    assert isclose(memory.update, 16 * mib + memory.layer + 4)
    # A token takes 2 x 2 bytes x 2 layers x 4 heads of 16; the share less weights less 4 GiB.
    assert isclose(memory.cache_tokens, ((6 - 4) * GIB - 2 * 2**20) / 512)


def test_the_largest_moment_counts(config):
    few = card_memory(SMALL, config({f"{ACTOR}.ppo_max_token_len_per_gpu": 1}), 80.0)
    # Optimizer's step: weights, gradients, moments and the square roots of one.
    assert isclose(few.update, 20 / 1024 + 4)
    large = ModelSize(1 << 20, 64, 16, 1, 4, 4, 16, 1 << 13, tied=True)
    changes = {f"{ACTOR}.ppo_max_token_len_per_gpu": 2048}
    scored = card_memory(large, config(changes), 80.0)
    # Float32 values of the entropy are more than the update takes, its gradients included.
    assert scored.scoring > scored.gradients + scored.loss
    assert isclose(scored.update, 12 / 1024 + 14 * 2048 * 2**13 / GIB + 4)


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({"actor_rollout_ref.rollout.temperature": 0.6}, 2),
        ({f"{ACTOR}.entropy_coeff": 0.001}, 3),
        ({f"{ACTOR}.calculate_entropy": True}, 3),
        ({f"{ACTOR}.calculate_entropy": True, f"{ACTOR}.fsdp_config.use_torch_compile": False}, 7),
    ],
)
def test_tensors_of_the_logits_size(config, changes, copies):
    tokens = tokens_at_once(config())
    memory = card_memory(SMALL, config(changes), 80.0)
    values = tokens * (64 * 2 + 5 * 64 + copies * 256)
    assert isclose(memory.loss, 2 * values / GIB)


def test_gradients_that_wait_for_the_last_micro_batch_are_whole(config):
    changes = {f"{ACTOR}.fsdp_config.use_no_sync_for_gradient_accumulation": True}
    memory = card_memory(SMALL, config(changes, "8gpu"), 80.0)
    assert (isclose(memory.gradients, 4 / 1024), isclose(memory.weights, 0.5 / 1024)) == (
        True,
        True,
    )


def test_cards_share_weights_gradients_and_moments(config):
    one, eight = (card_memory(QWEN_7B, config(hardware=h), 80.0) for h in ("1gpu", "8gpu"))
    assert isclose(eight.weights, one.weights / 8)
    assert isclose(eight.adam, one.adam / 8)
    assert eight.loss == one.loss
    grouped = config({f"{ACTOR}.fsdp_config.fsdp_size": 4}, "8gpu")
    assert isclose(card_memory(QWEN_7B, grouped, 80.0).weights, one.weights / 4)


@pytest.mark.parametrize(("hardware", "copies"), [("1gpu", 0), ("8gpu", 1)])
def test_a_loss_that_reads_the_head_has_its_moments_whole_on_each_card(config, hardware, copies):
    mode = f"{ACTOR}.policy_loss.loss_mode"
    plain, reading = (
        card_memory(QWEN_7B, config({mode: name}, hardware), 80.0) for name in ("vanilla", "capo")
    )
    # Two of 152,064 x 3,584, in float32.
    more = copies * 8 * 152_064 * 3584 / GIB
    assert isclose(reading.loss, plain.loss + more)
    assert isclose(reading.layer, plain.layer + more)
    assert isclose(reading.update, plain.update + more)


def test_offloading_takes_them_off_the_card(config):
    fsdp = f"{ACTOR}.fsdp_config"
    waiting = card_memory(
        SMALL, config({f"{fsdp}.param_offload": True, f"{fsdp}.optimizer_offload": True}), 80.0
    )
    assert (waiting.resident, waiting.weights > 0) == (0.0, True)
    half = card_memory(SMALL, config({f"{fsdp}.optimizer_offload": True}), 80.0)
    assert isclose(half.resident, 4 / 1024)
    away = card_memory(SMALL, config({f"{fsdp}.offload_policy": True}), 80.0)
    assert (away.weights, away.gradients, away.adam, away.resident) == (0, 0, 0, 0)
    assert away.step == 0


def test_a_reference_policy_waits_on_the_host(config):
    changes = {f"{ACTOR}.use_kl_loss": True}
    with_kl, without = config(changes), config()
    assert card_memory(SMALL, with_kl, 80.0) == card_memory(SMALL, without, 80.0)
    needed, text = host_memory(QWEN_7B, config(changes, "8gpu"))
    # Loading takes as much as the reference policy.
    assert isclose(needed, 4 * QWEN_7B.parameters / GIB)
    assert "keeping, 1 x 4 P; 4 P = 28.4" in text


def test_tensor_parallelism(config):
    split = card_memory(
        SMALL, config({"actor_rollout_ref.rollout.tensor_model_parallel_size": 2}), 10.0
    )
    assert isclose(split.cache_tokens, ((6 - 4) * GIB - 2**20) / 256)


def test_without_checkpointing_every_layer_keeps_its_values(config):
    changes = {"actor_rollout_ref.model.enable_gradient_checkpointing": False}
    tokens = tokens_at_once(config())
    memory = card_memory(SMALL, config(changes), 80.0)
    # 1792 values are saved in each layer, the last one's gradient takes 576 more.
    whole = 2 * 2**14 + 3 * (2**20 - 2**15) / 2
    assert isclose(memory.layer, 2 * (tokens * (2 * 1792 + 576) + whole) / GIB)


def test_without_a_token_budget_the_micro_batch_counts(config):
    changes = {f"{ACTOR}.use_dynamic_bsz": False, f"{ACTOR}.ppo_micro_batch_size_per_gpu": 3}
    assert tokens_at_once(config(changes)) == 3 * 1280
    assert tokens_at_once(config()) == 32768


@pytest.mark.parametrize(
    ("recipe", "hardware", "gigabytes"),
    [
        # The README's figures: eight ranks read a tied model, one an untied one.
        ("countdown3-1.5b", "8gpu", 49),
        ("countdown3-3b", "8gpu", 99),
        ("countdown3-7b", "8gpu", 30),
        # Waiting in host memory while vLLM samples, and living there.
        ("countdown3-3b", "1gpu", 37),
        ("countdown3-7b", "1gpu", 122),
    ],
)
def test_host_memory_of_the_readme(planned, recipe, hardware, gigabytes):
    config = planned(recipe=recipe, hardware=hardware).config
    needed, _ = host_memory(MODEL_SIZES[config.prepare.policy.arguments.repo], config)
    assert round(needed * GIB / 1e9) == gigabytes


def test_each_machine_keeps_a_copy_of_its_own(config):
    away = {f"{ACTOR}.fsdp_config.offload_policy": True}
    needed, text = host_memory(QWEN_7B, config(away, "2x8gpu"))
    assert isclose(needed, 16 * QWEN_7B.parameters / GIB)
    assert "keeping, 4 x 4 P" in text
    spread = away | {f"{ACTOR}.fsdp_config.fsdp_size": -1}
    assert isclose(host_memory(QWEN_7B, config(spread, "2x8gpu"))[0], needed / 2)


def test_host_memory_on_the_cpu(planned):
    # A micro-batch of 400 tokens a rank: ten sequences of 16 + 24.
    changes = {"trainer.n_gpus_per_node": 2, f"{ACTOR}.ppo_max_token_len_per_gpu": 400}
    needed, text = host_memory(SMALL, planned(changes).config)
    layer = (2**20 - 2**15) / 2
    # Two layers whose input of 64 values is kept, one that saves 1792 again, and the work on it.
    rank = 4 * 2**20 + 4 * (400 * (2 * 64 + 1792 + 576) + 2 * 2**14 + 3 * layer)
    assert isclose(needed, (16 * 2**20 + 2 * rank) / GIB)
    assert "and 2 times" in text
