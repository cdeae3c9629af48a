"""The doctor's arithmetic against verl's engine on the recipes' models, without data or GPU."""

from dataclasses import replace
from itertools import pairwise
from math import isclose

import pytest
import torch
import verl.utils.torch_functional as verl_functional
from composed_recipes import composed
from measured_memory import (
    held,
    hf_config,
    measure_adamw,
    measure_scoring,
    measure_update,
)
from model_sizes import MODEL_SIZES
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices
from transformers import AutoModelForCausalLM

from hpo_verl.checks.memory import (
    GIB,
    OVERHEAD_GIB,
    RECIPE_CARD_GIB,
    adapter_parameters,
    card_memory,
    tokens_at_once,
)
from hpo_verl.config.settings import cards_a_copy

TOLERANCE = 0.1
ACTOR, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"
RECIPES = {
    "Qwen/Qwen2.5-1.5B-Instruct": ("countdown3-1.5b", ()),
    "Qwen/Qwen2.5-3B-Instruct": ("countdown3-3b", ()),
    "meta-llama/Llama-3.2-3B-Instruct": ("countdown3-3b", ("model=llama3.2-3b",)),
    "Qwen/Qwen2.5-7B-Instruct": ("countdown3-7b", ()),
    "Qwen/Qwen3-0.6B": ("countdown3-1.5b", ("model=qwen3-0.6b",)),
    "Qwen/Qwen3-1.7B": ("countdown3-1.5b", ("model=qwen3-1.7b",)),
    "Qwen/Qwen3-4B": ("countdown3-1.5b", ("model=qwen3-4b",)),
    "Qwen/Qwen3.5-0.8B": ("countdown3-1.5b", ("model=qwen3.5-0.8b",)),
    "Qwen/Qwen3.5-2B": ("countdown3-1.5b", ("model=qwen3.5-2b",)),
}
# Every test run has one of each architecture, a sharded one and one with an adapter.
STEPS = [
    *(("Qwen/Qwen2.5-1.5B-Instruct", "1gpu"), ("meta-llama/Llama-3.2-3B-Instruct", "1gpu")),
    *(("Qwen/Qwen2.5-7B-Instruct", "8gpu"), ("Qwen/Qwen3-1.7B", "1gpu24")),
    ("Qwen/Qwen3.5-2B", "1gpu"),
]
SLOW_STEPS = [
    *((repo, hardware) for repo in list(RECIPES)[:4] for hardware in ("1gpu", "8gpu")),
    *(("Qwen/Qwen3-0.6B", "1gpu"), ("Qwen/Qwen3-4B", "8gpu")),
    # With an adapter.
    *(("Qwen/Qwen2.5-1.5B-Instruct", "1gpu24"), ("Qwen/Qwen3.5-0.8B", "1gpu24")),
]
STEPS += [pytest.param(*step, marks=pytest.mark.slow) for step in SLOW_STEPS if step not in STEPS]
# With fewer, no layer has one before it and one behind it.
FEW = 3


def recipe(repo, hardware="8gpu", **changes):
    """A recipe's configuration with `actor_rollout_ref`'s keys changed, dots as `__`."""
    config = OmegaConf.create(OmegaConf.to_container(composed(*RECIPES[repo], hardware)))
    for key, value in changes.items():
        OmegaConf.update(config, f"actor_rollout_ref.{key.replace('__', '.')}", value)
    return config


def near(measured, estimate):
    return isclose(measured, estimate, rel_tol=TOLERANCE)


def with_few_layers(repo, measured):
    return replace(MODEL_SIZES[repo], layers=FEW, parameters=measured.parameters)


def few_parameters(size):
    norm = size.hidden_size
    layer = (size.parameters - norm - 2 * size.vocabulary * size.hidden_size) // size.layers
    return size.parameters - (size.layers - FEW) * layer


@pytest.mark.parametrize("repo", MODEL_SIZES)
def test_dimensions_and_parameters_are_those_of_the_architecture(repo):
    size, config = MODEL_SIZES[repo], hf_config(repo)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == size.parameters
    # Where some layers have no attention, the last one has it.
    decoder = model.model.layers[-1]
    norm = sum(p.numel() for p in model.model.norm.parameters())
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert isclose(layers + norm, size.layer_parameters * size.layers)
    assert model.config.vocab_size == size.vocabulary
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == size.tied
    assert decoder.self_attn.k_proj.out_features == size.key_value_heads * size.head_size
    assert decoder.mlp.gate_proj.out_features == size.intermediate_size
    gated = 2 if size.delta else 1
    assert decoder.self_attn.q_proj.out_features == size.query_width * gated
    with_attention = [layer for layer in model.model.layers if hasattr(layer, "self_attn")]
    assert len(with_attention) == size.attention_layers
    assert hasattr(decoder.self_attn, "q_norm") == size.head_norms
    assert len(model.model.layers) == size.layers


@pytest.mark.parametrize(("repo", "hardware"), STEPS)
def test_a_step_of_each_recipe_takes_what_the_doctor_says(repo, hardware):
    config, size = recipe(repo, hardware), MODEL_SIZES[repo]
    memory = card_memory(size, config, RECIPE_CARD_GIB)
    # Each further layer adds the same, or each further four of which one has attention: the
    # whole model follows from a few layers.
    some = size.layers // size.attention_layers
    few = max(FEW, some)
    counts = [few + some * more for more in range(3 if hardware == "8gpu" else 2)]
    measured = [measure_update(config, repo, layers) for layers in counts]
    whole = {}
    for part in ("parameters", "weights", "trained", "loss", "layer"):
        values = [getattr(one, part) for one in measured]
        each = {later - one for one, later in pairwise(values)}
        assert max(each) - min(each) < 1e-6
        whole[part] = values[0] + each.pop() * (size.layers - few) / some
    parameters = size.parameters + adapter_parameters(size, config)
    assert whole["parameters"] == parameters
    assert isclose(whole["weights"], 4 * parameters / cards_a_copy(config) / GIB, rel_tol=1e-4)
    input_and_gradient = 4 * tokens_at_once(config) * size.hidden_size / GIB
    first = input_and_gradient if hardware == "1gpu24" else 0.0
    assert all(near(one.gradients, one.trained + first) for one in measured)
    scoring = measure_scoring(config, repo)
    assert near(whole["loss"], memory.loss)
    assert near(whole["layer"], memory.layer)
    assert near(scoring, memory.scoring)
    on_card = not config.actor_rollout_ref.actor.fsdp_config.offload_policy
    weights, trained = on_card * whole["weights"], on_card * whole["trained"]
    # AdamW's moments and its step, by the test of its own.
    largest = max(trained + first + max(whole["loss"], whole["layer"], trained), scoring)
    assert near(weights + 2 * trained + largest, memory.update - OVERHEAD_GIB)


def test_two_machines():
    repo = "Qwen/Qwen2.5-7B-Instruct"
    config = recipe(repo, "2x8gpu")
    measured = measure_update(config, repo, FEW)
    memory = card_memory(with_few_layers(repo, measured), config, RECIPE_CARD_GIB)
    assert isclose(measured.weights, memory.weights, rel_tol=1e-4)
    assert near(measured.loss, memory.loss)
    assert near(measured.layer, memory.layer)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__enable_gradient_checkpointing": False},
        # A second tensor of logits.
        {"rollout__temperature": 0.7},
        {"actor__entropy_coeff": 0.01, "actor__fsdp_config__use_torch_compile": False},
        {"actor__ppo_max_token_len_per_gpu": 8192},
    ],
)
def test_other_settings(changes):
    repo = "Qwen/Qwen2.5-7B-Instruct"
    config = recipe(repo, **changes)
    measured = measure_update(config, repo, FEW, with_entropy="actor__entropy_coeff" in changes)
    memory = card_memory(with_few_layers(repo, measured), config, RECIPE_CARD_GIB)
    assert near(measured.loss, memory.loss)
    assert near(measured.layer, memory.layer)
    assert near(measure_scoring(config, repo), memory.scoring)


@pytest.mark.parametrize("rank", [0, 16])
def test_layers_without_attention_keep_what_the_doctor_says(rank):
    repo = "Qwen/Qwen3.5-2B"
    config = recipe(repo, model__enable_gradient_checkpointing=False, model__lora_rank=rank)
    measured = measure_update(config, repo, 4)
    size = MODEL_SIZES[repo]
    delta = replace(size.delta, layers=3)
    few = replace(size, layers=4, delta=delta, parameters=few_parameters(size))
    memory = card_memory(few, config, RECIPE_CARD_GIB)
    assert near(measured.loss, memory.loss)
    assert near(measured.layer, memory.layer)


def test_gradients_that_are_exchanged_once_are_whole_on_every_card():
    repo = "Qwen/Qwen2.5-1.5B-Instruct"
    config = recipe(repo, actor__fsdp_config__use_no_sync_for_gradient_accumulation=True)
    measured = measure_update(config, repo, FEW)
    memory = card_memory(with_few_layers(repo, measured), config, RECIPE_CARD_GIB)
    assert near(measured.gradients, memory.gradients)
    assert isclose(memory.gradients, 8 * memory.weights)


def test_an_adapter_leaves_the_rest_without_gradients():
    repo = "Qwen/Qwen2.5-7B-Instruct"
    config = recipe(repo, model__lora_rank=64)
    measured = measure_update(config, repo, FEW)
    size = MODEL_SIZES[repo]
    few = replace(size, layers=FEW, parameters=few_parameters(size))
    memory = card_memory(few, config, RECIPE_CARD_GIB)
    assert measured.parameters == few.parameters + adapter_parameters(few, config)
    assert near(measured.weights, memory.weights)
    assert near(measured.gradients, memory.gradients)
    assert near(measured.loss, memory.loss)
    assert near(measured.layer, memory.layer)


def test_adamw_takes_two_moments_and_one_more_copy_in_its_step():
    moments, step = measure_adamw(parameters=1 << 28)
    assert near(moments, 2.0)
    assert near(step, 1.0)
    # What the measured path is on CUDA, where it is torch's default.
    assert "cuda" in _get_foreach_kernels_supported_devices()
    assert DTensor in _foreach_supported_types


def test_a_compiled_entropy_keeps_nothing_but_the_logits():
    function = torch.compile(
        verl_functional.entropy_from_logits_with_chunking,
        dynamic=True,
        # What inductor decides to keep, without its compiler.
        backend="aot_eager_decomp_partition",
    )
    logits = torch.zeros(4096, 1024, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(logits)
    assert near(sum(kept.values()), 2 * logits.numel())


def test_log_probabilities_on_the_cpu_need_three_tensors_of_the_logits():
    tokens, vocabulary = 64, 151_936
    with FakeTensorMode(), MemTracker() as tracker:
        hidden = torch.zeros(1, tokens, 8, requires_grad=True)
        logits = hidden @ torch.zeros(8, vocabulary)
        packed = torch.cat(list(logits.unbind()))
        labels = torch.zeros(tokens, dtype=torch.long)
        loss = verl_functional.logprobs_from_logits_v2(packed, labels).sum()
        del logits, packed
        loss.backward()
        assert near(held(tracker, "peak") * GIB, 3 * 4 * tokens * vocabulary)
