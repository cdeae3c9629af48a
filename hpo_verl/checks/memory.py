"""How much memory a run needs, by the arithmetic of docs/pages/recipes.md.

P parameters, A those of a LoRA adapter, S those that are trained (P, or A), G cards
over which weights are sharded, T tokens a card holds at once, h hidden size, m
intermediate size, q and k width of the queries and of the keys, L layers, V
vocabulary, p parameters of one layer.

What verl's FSDP2 engine holds on a card is measured with tensors without data in
tests/checks/test_memory_measured.py. The rest is an estimate: OVERHEAD_GIB,
vLLM's cache and the host's memory. Nothing was run on a GPU.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from hpo_verl.config.settings import cards_a_copy
from hpo_verl.errors import DataError

GIB = 1 << 30
# CUDA, NCCL, a sleeping vLLM and fragments; likewise beside vLLM's share. GiB.
OVERHEAD_GIB = 4.0
# The cards that the recipes are written for.
RECIPE_CARD_GIB = 80.0
OUTPUT_EMBEDDING = "lm_head.weight"
HEAD_NORM = "q_norm.weight"
HALF = ("bf16", "bfloat16", "fp16", "float16", "16")


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a dense decoder.

    Attributes:
        tied: whether input and output embedding are one matrix.
        head_norms: whether queries and keys are normalised, as in Qwen3.
    """

    parameters: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    head_norms: bool = False

    @property
    def query_width(self) -> int:
        """Width of all queries, which need not be the hidden size."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Width of all keys."""
        return self.key_value_heads * self.head_size

    @property
    def layer_parameters(self) -> float:
        """Parameters of one decoder layer, the last norm shared out."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden_size
        return (self.parameters - embeddings) / self.layers

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values in bfloat16 that one token takes in the cache."""
        return 2 * 2 * self.layers * self.key_width


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor of a model, from the headers of its safetensors files.

    Raises:
        DataError: a file is damaged or cut off, or there is none.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} is not a whole safetensors file ({error})") from error
    if not shapes:
        raise DataError(f"{folder} holds no weights (*.safetensors)")
    return shapes


def read_model_size(folder: Path) -> ModelSize:
    """Read a model's dimensions from its `config.json` and the headers of its weights.

    Raises:
        DataError: names the file and what it lacks.
    """
    path, shapes = folder / "config.json", weight_shapes(folder)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        # A shared matrix is stored once; config.json may leave its default out.
        tied = config.get("tie_word_embeddings", OUTPUT_EMBEDDING not in shapes)
        if tied:
            # The files of Qwen3-0.6B hold it twice all the same.
            shapes.pop(OUTPUT_EMBEDDING, None)
        return ModelSize(
            parameters=sum(map(math.prod, shapes.values())),
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            vocabulary=config["vocab_size"],
            tied=bool(tied),
            head_norms=any(name.endswith(HEAD_NORM) for name in shapes),
        )
    except KeyError as error:
        raise DataError(f"{path}: has no {error.args[0]}") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error


class CardMemory(NamedTuple):
    """Memory of one card in the phases of a step, GiB; four moments are beside the shards.

    Attributes:
        weights: 4 (P + A) / G, float32, frozen or not.
        gradients: 4 S / G; 4 S where verl exchanges them after the last micro-batch only. With
            an adapter 4 T h more, the first layer's input and its gradient.
        adam: 8 S / G, two moments.
        loss: the logits become their gradient.
        layer: the last layer is recomputed and gets its gradient.
        step: AdamW's square roots of the second moments, 4 S / G.
        scoring: the entropy of one chunk of tokens; there are no gradients then.
        resident: what stays on the card while responses are sampled.
        rollout: vLLM's share.
        cache_tokens: tokens that vLLM's cache holds beside its weights.
    """

    weights: float
    gradients: float
    adam: float
    loss: float
    layer: float
    step: float
    scoring: float
    resident: float
    rollout: float
    cache_tokens: float

    @property
    def update(self) -> float:
        """The peak of scoring and update, GiB."""
        peak = max(self.gradients + max(self.loss, self.layer, self.step), self.scoring)
        return self.weights + self.adam + peak + OVERHEAD_GIB

    @property
    def sampling(self) -> float:
        """What is taken while vLLM samples, GiB."""
        return self.rollout + self.resident + OVERHEAD_GIB

    @property
    def arithmetic(self) -> str:
        """The estimate as a text with every term."""
        return (
            f"update {self.update:.1f} GiB = weights {self.weights:.1f} + gradients "
            f"{self.gradients:.1f} + Adam {self.adam:.1f} + {OVERHEAD_GIB:g} + the largest of loss "
            f"{self.loss:.1f}, layer {self.layer:.1f}, AdamW's step {self.step:.1f} and scoring, "
            f"without gradients, {self.scoring:.1f}; sampling {self.sampling:.1f} GiB = vLLM "
            f"{self.rollout:.1f} + resident {self.resident:.1f} + {OVERHEAD_GIB:g}; vLLM's cache "
            f"{self.cache_tokens / 1e6:.1f} M tokens"
        )


def tokens_at_once(config: DictConfig) -> int:
    """Tokens that one rank holds in the update: its budget, or its micro-batch at full length."""
    actor = config.actor_rollout_ref.actor
    if actor.use_dynamic_bsz:
        return actor.ppo_max_token_len_per_gpu
    longest = config.data.max_prompt_length + config.data.max_response_length
    return (actor.get("ppo_micro_batch_size_per_gpu") or 1) * longest


def adapter_parameters(size: ModelSize, config: DictConfig) -> int:
    """Parameters of a run's LoRA adapter, two matrices for each layer's target; 0 without one."""
    model, hidden, middle = config.actor_rollout_ref.model, size.hidden_size, size.intermediate_size
    # Input and output of each.
    widths = {
        **dict.fromkeys(("q_proj", "o_proj"), hidden + size.query_width),
        **dict.fromkeys(("k_proj", "v_proj"), hidden + size.key_width),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + middle),
    }
    # A text is `all-linear` or a pattern, of which that is the most.
    targets = widths if isinstance(model.target_modules, str) else model.target_modules
    return size.layers * model.lora_rank * sum(widths.get(name, 0) for name in targets)


def trained_parameters(size: ModelSize, config: DictConfig) -> int:
    """Parameters that have a gradient and Adam's moments: the adapter's, or all."""
    return adapter_parameters(size, config) or size.parameters


def card_memory(size: ModelSize, config: DictConfig, card: float) -> CardMemory:
    """Estimate the memory taken in each phase of a card of so many GiB."""
    rollout, fsdp = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor.fsdp_config
    parameters, trained = size.parameters, trained_parameters(size, config)
    stored = (2 if str(fsdp.model_dtype) in HALF else 4) / GIB
    on_card = 0.0 if fsdp.offload_policy else stored / cards_a_copy(config)
    weights = on_card * (parameters + adapter_parameters(size, config))
    whole = fsdp.use_no_sync_for_gradient_accumulation
    share, parallel = card * rollout.gpu_memory_utilization, rollout.tensor_model_parallel_size
    cache = (share - OVERHEAD_GIB) * GIB - 2 * parameters / parallel
    loss, layer = _backward_moments(size, config, 2)
    adam = 2 * on_card * trained
    gradients = stored * trained if whole else on_card * trained
    if trained != parameters:
        gradients += 4 * tokens_at_once(config) * size.hidden_size / GIB
    return CardMemory(
        weights=weights,
        gradients=gradients,
        adam=adam,
        loss=loss,
        layer=layer,
        step=on_card * trained,
        scoring=_scoring(size, config),
        resident=weights * (not fsdp.param_offload) + adam * (not fsdp.optimizer_offload),
        rollout=share,
        cache_tokens=cache / (size.cache_bytes_per_token / parallel),
    )


def _backward_moments(size: ModelSize, config: DictConfig, width: int) -> tuple[float, float]:
    """The two peaks of the backward pass, GiB; `width` is the bytes of a value.

    A layer saves 4 m + 8 h + 2 q + 2 k values a token: four of the feed-forward, four
    of each of two norms (a float32 value counts twice), query, attention's output,
    key and value; and 3 (q + k) if queries and keys are normalised. A frozen norm keeps
    one value less. Its backward pass takes 2 m + h more at most. Gradient checkpointing
    keeps the layer's input (h) until it is recomputed.

    Returns:
        - loss: beside what the layers keep, 5 h of the last norm and the logits. Further
          tensors of their size are gone when the vocabulary's matrix comes with its
          gradient and one layer that is fetched ahead: the larger of the two counts.
        - layer: beside what the layers keep, the work on the last one, the matrix with
          its gradient, and three times a layer: itself, its gradient, the next one.
        What is frozen has no gradient in either.
    """
    tokens, copies = tokens_at_once(config), _logits_copies(config, width)
    hidden, middle, vocabulary = size.hidden_size, size.intermediate_size, size.vocabulary
    adapter = adapter_parameters(size, config)
    frozen = adapter > 0
    heads = size.query_width + size.key_width
    saved = 4 * middle + (8 - 2 * frozen) * hidden + 2 * heads
    saved += size.head_norms * (3 - frozen) * heads
    kept, work = saved, 2 * middle + hidden
    if config.actor_rollout_ref.model.enable_gradient_checkpointing:
        kept, work = hidden, work + saved
    kept, matrix = kept * size.layers, (2 - frozen) * vocabulary * hidden
    layer = size.layer_parameters + adapter / size.layers
    more = max(matrix + layer, (copies - 1) * tokens * vocabulary)
    loss_values = tokens * (kept + 5 * hidden + vocabulary) + more
    layer_values = tokens * (kept + work) + matrix + (3 - frozen) * layer
    return width * loss_values / GIB, width * layer_values / GIB


def _logits_copies(config: DictConfig, width: int) -> int:
    """How many tensors of the logits' size are alive at once in the update.

    flash-attn writes the gradient over the logits. verl divides into a second
    tensor by any temperature but 1. With an entropy, its gradient and that of the
    log-probabilities are tensors of their own; not compiled, the entropy also keeps
    float32 values. In float32 (on the CPU) verl packs a copy, whose gradient is a third.
    """
    actor = config.actor_rollout_ref.actor
    if width == 4:
        return 3
    if actor.entropy_coeff or actor.calculate_entropy:
        return 3 if actor.fsdp_config.use_torch_compile else 7
    return 1 if config.actor_rollout_ref.rollout.temperature == 1 else 2


def _scoring(size: ModelSize, config: DictConfig) -> float:
    """Logits and the entropy of one chunk: values, softmax and product in float32.

    Compiled, as by default, the entropy may take less.
    """
    tokens, fsdp = tokens_at_once(config), config.actor_rollout_ref.actor.fsdp_config
    chunk = tokens
    if fsdp.entropy_from_logits_with_chunking:
        chunk = min(tokens, fsdp.entropy_from_logits_chunk_size)
    copies = 1 if config.actor_rollout_ref.rollout.temperature == 1 else 2
    return 2 * (tokens * copies + 6 * chunk) * size.vocabulary / GIB


def host_memory(size: ModelSize, config: DictConfig) -> tuple[float, str]:
    """GiB that one machine needs while the policy is loaded and trained, and the arithmetic."""
    weights, ranks = 4 * size.parameters / GIB, config.trainer.n_gpus_per_node
    adapter = 4 * adapter_parameters(size, config) / GIB
    trained, held = adapter or weights, weights + adapter
    # verl copies the frozen weights while the adapter is added into them for the rollout.
    copied = bool(adapter) and bool(config.actor_rollout_ref.model.lora.merge)
    if config.trainer.device == "cpu":
        loss, layer = _backward_moments(size, config, 4)
        work = max(ranks * max(loss, layer), copied * weights)
        text = (
            f"weights 4 (P + A), gradients and Adam 12 S, and {ranks} times a rollout's 4 P, with "
            f"the larger of loss {loss:.1f} and layer {layer:.1f} each; 4 P = {weights:.1f}, "
            f"4 A = {adapter:.1f}, 4 S = {trained:.1f}"
        )
        return held + 3 * trained + ranks * weights + work, text
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    fsdp = actor.fsdp_config
    # Tied embeddings keep FSDP from loading on one rank only.
    loading = ranks if size.tied else 1
    # Weights, gradients and Adam live there, or wait there while vLLM samples.
    kept = fsdp.param_offload * held + 2 * fsdp.optimizer_offload * trained
    if fsdp.offload_policy:
        kept = held + 3 * trained
    if adapter:
        # A policy that is never trained is the frozen weights; a sleeping vLLM that gets the
        # adapter alone keeps its own, in bfloat16.
        shares = cards_a_copy(config) / rollout.tensor_model_parallel_size
        kept += weights if copied else weights / 2 * shares
    else:
        # verl's engines keep a policy that is never trained there.
        kept += bool(actor.use_kl_loss or config.algorithm.use_kl_in_reward) * weights
    kept *= ranks / cards_a_copy(config) / weights
    text = f"the larger of loading, {loading} x 4 P, and keeping, {kept:.3g} x 4 P; 4 P"
    return max(loading, kept) * weights, f"{text} = {weights:.1f}"
