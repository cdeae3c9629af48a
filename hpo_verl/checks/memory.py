"""How much memory a run needs, by the arithmetic of docs/pages/recipes.md.

P parameters, G cards over which weights are sharded, T tokens a card holds at
once, h hidden size, m intermediate size, k width of the keys, L layers, V
vocabulary, p parameters of one layer, b bytes of a value (2 in bfloat16, 4 in
float32).

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


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a dense decoder; `tied`: input and output embedding are one matrix."""

    parameters: int
    hidden_size: int
    intermediate_size: int
    layers: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def layer_parameters(self) -> float:
        """Parameters of one decoder layer, the last norm shared out."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden_size
        return (self.parameters - embeddings) / self.layers

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values in bfloat16 that one token takes in the cache."""
        return 2 * 2 * self.layers * self.key_value_heads * self.head_size


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
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            vocabulary=config["vocab_size"],
            tied=bool(tied),
        )
    except KeyError as error:
        raise DataError(f"{path}: has no {error.args[0]}") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error


class CardMemory(NamedTuple):
    """Memory of one card in the phases of a step, GiB; four moments are beside the shards.

    Attributes:
        weights: 4 P / G, float32.
        gradients: 4 P / G; 4 P where verl exchanges them after the last micro-batch only.
        adam: 8 P / G, two moments.
        loss: the logits become their gradient.
        layer: the last layer is recomputed and gets its gradient.
        step: AdamW's square roots of the second moments, 4 P / G.
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


def card_memory(size: ModelSize, config: DictConfig, card: float) -> CardMemory:
    """Estimate the memory taken in each phase of a card of so many GiB."""
    rollout, fsdp = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor.fsdp_config
    cards, parameters = cards_a_copy(config), size.parameters
    weights = 0.0 if fsdp.offload_policy else 4 * parameters / cards / GIB
    whole = fsdp.use_no_sync_for_gradient_accumulation
    share, parallel = card * rollout.gpu_memory_utilization, rollout.tensor_model_parallel_size
    cache = (share - OVERHEAD_GIB) * GIB - 2 * parameters / parallel
    loss, layer = _backward_moments(size, config, 2)
    return CardMemory(
        weights=weights,
        gradients=4 * parameters / GIB if whole else weights,
        adam=2 * weights,
        loss=loss,
        layer=layer,
        step=weights,
        scoring=_scoring(size, config),
        resident=weights * (not fsdp.param_offload) + 2 * weights * (not fsdp.optimizer_offload),
        rollout=share,
        cache_tokens=cache / (size.cache_bytes_per_token / parallel),
    )


def _backward_moments(size: ModelSize, config: DictConfig, width: int) -> tuple[float, float]:
    """The two peaks of the backward pass, GiB; `width` is the bytes of a value.

    A layer saves 4 m + 10 h + 2 k values a token: four of the feed-forward, four
    of each of two norms (a float32 value counts twice), query, attention's output,
    key and value. Its backward pass takes 2 m + h more at most. Gradient
    checkpointing keeps the layer's input (h) until it is recomputed.

    Returns:
        - loss: beside what the layers keep, 5 h of the last norm and the logits. Further
          tensors of their size are gone when the vocabulary's matrix comes with its
          gradient and one layer that is fetched ahead: the larger of the two counts.
        - layer: beside what the layers keep, the work on the last one, the matrix with
          its gradient, and three times a layer: itself, its gradient, the next one.
    """
    tokens, copies = tokens_at_once(config), _logits_copies(config, width)
    hidden, middle, vocabulary = size.hidden_size, size.intermediate_size, size.vocabulary
    saved = 4 * middle + 10 * hidden + 2 * size.key_value_heads * size.head_size
    kept, work = saved, 2 * middle + hidden
    if config.actor_rollout_ref.model.enable_gradient_checkpointing:
        kept, work = hidden, work + saved
    kept, matrix, layer = kept * size.layers, 2 * vocabulary * hidden, size.layer_parameters
    more = max(matrix + layer, (copies - 1) * tokens * vocabulary)
    loss_values = tokens * (kept + 5 * hidden + vocabulary) + more
    layer_values = tokens * (kept + work) + matrix + 3 * layer
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
    if config.trainer.device == "cpu":
        loss, layer = _backward_moments(size, config, 4)
        text = (
            f"weights, gradients and Adam 16 P, and {ranks} times a rollout's 4 P with the larger "
            f"of loss {loss:.1f} and layer {layer:.1f}; 4 P = {weights:.1f}"
        )
        return 4 * weights + ranks * (weights + max(loss, layer)), text
    actor = config.actor_rollout_ref.actor
    fsdp = actor.fsdp_config
    # Tied embeddings keep FSDP from loading on one rank only.
    loading = ranks if size.tied else 1
    # Weights, gradients and Adam live there, or wait there while vLLM samples.
    kept = 4 if fsdp.offload_policy else bool(fsdp.param_offload) + 2 * bool(fsdp.optimizer_offload)
    # verl's engines keep a policy that is never trained there.
    kept += bool(actor.use_kl_loss or config.algorithm.use_kl_in_reward)
    kept *= ranks / cards_a_copy(config)
    text = f"the larger of loading, {loading} x 4 P, and keeping, {kept:g} x 4 P; 4 P"
    return max(loading, kept) * weights, f"{text} = {weights:.1f}"
