"""Measures the memory of verl's FSDP2 engine with tensors that have shapes and no data.

torch's `FakeTensorMode` runs the real model, verl's real engine and FSDP2 without
allocating; torch's `FSDPMemTracker` counts the storages. CUDA's kernels are those of
`kernels_without_data`.
"""

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import verl.utils.model
import verl.utils.torch_functional as verl_functional
from kernels_without_data import Convolution, CrossEntropy, FlashAttention, GatedNorm, delta_rule
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPOptimizerConfig
from verl.workers.engine.fsdp import transformer_impl

from hpo_verl.checks.memory import GIB, tokens_at_once

ATTENTION = "without_data"
CPU = torch.device("cpu")
# As each model's config.json says: hidden, intermediate, layers, heads, key-value heads,
# vocabulary, tied.
DIMENSIONS = {
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen/Qwen2.5-3B-Instruct": (2048, 11_008, 36, 16, 2, 151_936, True),
    "meta-llama/Llama-3.2-3B-Instruct": (3072, 8192, 28, 24, 8, 128_256, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18_944, 28, 28, 4, 152_064, False),
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, 8, 151_936, True),
    "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, 8, 151_936, True),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, 8, 151_936, True),
    "Qwen/Qwen3.5-0.8B": (1024, 3584, 24, 8, 2, 248_320, True),
    "Qwen/Qwen3.5-2B": (2048, 6144, 24, 8, 2, 248_320, True),
}


def attention(module, query, key, value, mask, **_):
    packed = (t.transpose(1, 2).squeeze(0) for t in (query, key, value))
    return FlashAttention.apply(*packed).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *_, **__: None)


def cross_entropy(logits, labels, inplace_backward=False):
    return CrossEntropy.apply(logits, labels, inplace_backward), None


class MicroBatch(dict):
    """Two packed sequences; as much of a TensorDict as `forward_step` asks for."""

    def to(self, _):
        return self


@dataclass(frozen=True)
class Measured:
    """GiB of one micro-batch's forward and backward passes.

    Attributes:
        parameters: number of them.
        weights: the shards.
        trained: those of them that are trained.
        gradients: what is left of the micro-batch beside the weights.
        loss: peak until the last layer's output has its gradient, without weights and gradients.
        layer: peak of the layers' backward passes, likewise.
    """

    parameters: int
    weights: float
    trained: float
    gradients: float
    loss: float
    layer: float


def hf_config(repo, layers=None):
    """The model's configuration for transformers, with another number of layers."""
    hidden, middle, depth, heads, key_value_heads, vocabulary, tied = DIMENSIONS[repo]
    kinds = {
        "Llama": LlamaConfig, "Qwen3-": Qwen3Config, "Qwen2.5": Qwen2Config,
        # Without the tower that sees images.
        "Qwen3.5": partial(Qwen3_5TextConfig, linear_num_value_heads=16),
    }  # fmt: skip
    return next(kind for name, kind in kinds.items() if name in repo)(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=256 if "Qwen3.5" in repo else 128,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        attn_implementation=ATTENTION,
    )


def from_config(config, torch_dtype, **_):
    """Instead of `from_pretrained`."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
    for module in model.modules():
        if isinstance(module, Qwen3_5GatedDeltaNet):
            module.chunk_gated_delta_rule = delta_rule
            module.causal_conv1d_fn = lambda x, weight, **_: Convolution.apply(x, weight)
            module.norm = GatedNorm(module.norm.weight)
    return model


@contextmanager
def replaced():
    """What needs data, files or a GPU, replaced."""
    auto_class = SimpleNamespace(from_pretrained=lambda _=None, **names: from_config(**names))
    with (
        mock.patch.object(verl.utils.model, "get_hf_auto_model_class", return_value=auto_class),
        mock.patch.object(transformer_impl, "apply_monkey_patch"),
        mock.patch.object(transformer_impl, "fsdp2_load_full_state_dict"),
        # All have their type and place already, and torch cannot swap tensors without data.
        mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module),
        mock.patch.object(verl_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True),
        mock.patch.object(verl_functional, "cross_entropy_loss", cross_entropy, create=True),
    ):
        yield


@contextmanager
def engine_without_data(config, repo, layers):
    """verl's engine with a recipe's settings and a whole token budget of two sequences.

    The process group has the recipe's ranks, of which only this one exists. Shards
    are counted as on the card, whether or not the recipe keeps them on the host.

    Yields:
        The engine and its micro-batch.
    """
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        changes = {"strategy": actor.strategy, "use_torch_compile": False, "offload_policy": False}
        engine = transformer_impl.FSDPEngineWithLMHead(
            model_config=SimpleNamespace(
                hf_config=hf_config(repo, layers),
                use_remove_padding=model.use_remove_padding,
                enable_gradient_checkpointing=model.enable_gradient_checkpointing,
                enable_activation_offload=model.enable_activation_offload,
                use_liger=model.use_liger,
                use_fused_kernels=model.use_fused_kernels,
                fused_kernel_options=None,
                lora_rank=model.lora_rank,
                lora_alpha=model.lora_alpha,
                lora_adapter_path=None,
                target_modules=model.target_modules,
                target_parameters=None,
                exclude_modules=None,
                model_type="language_model",
                local_path="",
                trust_remote_code=False,
            ),
            engine_config=omega_conf_to_dataclass(OmegaConf.merge(actor.fsdp_config, changes)),
            optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1),
            checkpoint_config=None,
        )
        with replaced(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
            # verl reads the loss as a number.
            mode.allow_scalar_outputs = True
            engine._build_model_optimizer()
            yield engine, packed_batch(engine, config)
    finally:
        dist.destroy_process_group()


def packed_batch(engine, config):
    tokens, temperature = tokens_at_once(config), config.actor_rollout_ref.rollout.temperature
    ids, ends = torch.zeros(tokens, dtype=torch.long), torch.tensor([0, tokens // 2, tokens])
    inputs = {"input_ids": ids[None], "position_ids": ids[None], "attention_mask": None}
    arguments = {
        "input_ids_rmpad_rolled": ids,
        "temperature_rmpad": torch.ones(tokens),
        "temperature_is_one": transformer_impl._is_scalar_unit_temperature(temperature),
        "pad_size": 0,
    }
    # Packing reads the lengths, which are data; this is its result.
    engine.prepare_model_inputs = lambda micro_batch: (inputs, arguments)
    return MicroBatch(input_ids=torch.nested.nested_tensor_from_jagged(ids, ends))


def held(tracker, kind="current"):
    return tracker.get_tracker_snapshot(kind)[CPU]["Total"] / GIB


def shards(engine, trained=False):
    weights = (w for w in engine.module.parameters() if w.requires_grad or not trained)
    return sum(w.to_local().untyped_storage().nbytes() for w in weights) / GIB


def decoder_layers(engine):
    """The decoder's layers, an adapter around them or not."""
    return next(m for m in engine.module.modules() if isinstance(m, torch.nn.ModuleList))


def measure_scoring(config, repo):
    """Peak beside the weights while log-probabilities and entropy are taken, GiB.

    Without gradients a layer leaves nothing behind: one is enough.
    """
    with engine_without_data(config, repo, layers=1) as (engine, batch):
        engine.module.eval()
        batch["calculate_entropy"] = True
        with FSDPMemTracker(engine.module) as tracker, torch.no_grad():
            engine.forward_step(batch, None, forward_only=True)
        return held(tracker, "peak") - shards(engine)


def measure_update(config, repo, layers, with_entropy=False):
    """Measure a micro-batch that is not the first: gradients of another are there.

    Args:
        config: verl's whole configuration.
        repo: a key of `DIMENSIONS`.
        layers: of the model.
        with_entropy: whether the loss has an entropy term.
    """

    def loss_function(model_output, data, dp_group):
        terms = ["log_probs", "entropy"] if with_entropy else ["log_probs"]
        return sum(model_output[name].values().sum() for name in terms), {}

    with engine_without_data(config, repo, layers) as (engine, batch):
        batch["calculate_entropy"] = with_entropy
        weights, gradients = list(engine.module.parameters()), 0.0
        if not engine.engine_config.use_no_sync_for_gradient_accumulation:
            gradients = shards(engine, trained=True)
            for weight in weights:
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        engine.module.train()
        decoder, peaks = decoder_layers(engine), []

        def at_last_layer(_module, _arguments, output):
            output.register_hook(lambda _: peaks.append(held(tracker, "peak")))

        with (
            engine._gradient_sync_context(is_last_micro_batch=False),
            FSDPMemTracker(engine.module) as tracker,
        ):
            handle = decoder[-1].register_forward_hook(at_last_layer)
            loss, _ = engine.forward_step(batch, loss_function, forward_only=False)
            loss.backward()
            handle.remove()
            # Its graph, which has circles, keeps the input of the first layer and its gradient.
            del loss
            gc.collect()
        states = shards(engine) + gradients
        layer = max(tracker.memory_tracking[module].local_peak[CPU] for module in decoder)
        return Measured(
            parameters=sum(weight.numel() for weight in weights),
            weights=shards(engine),
            trained=shards(engine, trained=True),
            gradients=held(tracker) - shards(engine),
            loss=peaks[0] - states,
            layer=layer / GIB - states,
        )


def measure_adamw(parameters):
    """GiB of AdamW's moments, and of its step beside weights, gradients and moments."""
    with FakeTensorMode():
        weights = [torch.zeros(parameters // 4, requires_grad=True) for _ in range(4)]
        # On CUDA torch takes the same path by itself.
        optimizer = torch.optim.AdamW(weights, foreach=True)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        states = 2 * 4 * parameters / GIB
        tracker = MemTracker()
        tracker.track_external(*weights, *(w.grad for w in weights), optimizer)
        with tracker:
            optimizer.step()
            moments = held(tracker) - states
            optimizer.step()
        return moments, held(tracker, "peak") - states - moments
