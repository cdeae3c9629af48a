"""How much memory a run needs, by the arithmetic of docs/pages/recipes.md.

P parameters, G cards over which weights are sharded, T tokens a card holds at
once, h hidden size, m intermediate size, k width of the keys, L layers, V
vocabulary, p parameters of one layer, b bytes of a value (2 in bfloat16, 4 in
float32).

What verl's FSDP2 engine holds on a card (`Moment`) is measured with tensors
without data in tests/checks/test_memory_measured.py. The rest is an estimate:
OVERHEAD_GIB, vLLM's cache and the host's memory. Nothing was run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from omegaconf import DictConfig

from hpo_verl.checks.model_size import ModelSize
from hpo_verl.config.settings import cards_a_copy

GIB = 1 << 30
# CUDA, NCCL, a sleeping vLLM and fragments; likewise beside vLLM's share. GiB.
OVERHEAD_GIB = 4.0
# The cards that the recipes are written for.
RECIPE_CARD_GIB = 80.0
# What verl reserves of Ray's CPUs for a rank (max_colocate_count).
CPUS_PER_RANK = 3
ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


class Moment(NamedTuple):
    """What a card holds beside its shards at one moment, GiB, and the arithmetic."""

    size: float
    text: str


@dataclass(frozen=True)
class CardMemory:
    """Memory of one card in the phases of a step, GiB.

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
    loss: Moment
    layer: Moment
    step: Moment
    scoring: Moment
    resident: float
    rollout: float
    cache_tokens: float

    @property
    def update(self) -> float:
        """The peak of scoring and update, GiB."""
        largest = max(self.loss.size, self.layer.size, self.step.size)
        peak = max(self.gradients + largest, self.scoring.size)
        return self.weights + self.adam + peak + OVERHEAD_GIB

    @property
    def sampling(self) -> float:
        """What is taken while vLLM samples, GiB."""
        return self.rollout + self.resident + OVERHEAD_GIB


def tokens_at_once(config: DictConfig) -> int:
    """Tokens that one rank holds in the update: its budget, or its micro-batch at full length."""
    actor = config.actor_rollout_ref.actor
    if actor.use_dynamic_bsz:
        return actor.ppo_max_token_len_per_gpu
    longest = config.data.max_prompt_length + config.data.max_response_length
    return (actor.get("ppo_micro_batch_size_per_gpu") or 1) * longest


def card_memory(size: ModelSize, config: DictConfig, card: float) -> CardMemory:
    """Estimate a card's memory in each phase.

    Args:
        size: dimensions of the policy.
        config: verl's whole configuration.
        card: memory of one card, GiB.
    """
    rollout, fsdp = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor.fsdp_config
    host = bool(fsdp.offload_policy)
    gpus, parameters = cards_a_copy(config), size.parameters
    weights, gradients, adam = (
        0.0 if host else bytes_each * parameters / gpus / GIB for bytes_each in (4, 4, 8)
    )
    if fsdp.use_no_sync_for_gradient_accumulation:
        gradients = 4 * parameters / GIB
    share = card * rollout.gpu_memory_utilization
    tensor_parallel = rollout.tensor_model_parallel_size
    cache = share * GIB - 2 * parameters / tensor_parallel - OVERHEAD_GIB * GIB
    loss, layer = _backward_moments(size, config, 2)
    return CardMemory(
        weights=weights,
        gradients=gradients,
        adam=adam,
        loss=loss,
        layer=layer,
        step=Moment(weights, f"4 x {parameters:,} / {gpus}" if weights else "on the host"),
        scoring=_scoring(size, config),
        resident=weights * (not fsdp.param_offload) + adam * (not fsdp.optimizer_offload),
        rollout=share,
        cache_tokens=cache / (size.cache_bytes_per_token / tensor_parallel),
    )


def _backward_moments(size: ModelSize, config: DictConfig, width: int) -> tuple[Moment, Moment]:
    """The two peaks of the backward pass; `width` is the bytes of a value.

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

    def moment(values: int, text: str, whole: float, whole_text: str) -> Moment:
        return Moment(
            width * (tokens * (kept * size.layers + values) + whole) / GIB,
            f"{width} x ({tokens} tokens x ({kept} x {size.layers} + {text}) + {whole_text})",
        )

    layer = size.layer_parameters
    matrix, matrix_text = 2 * vocabulary * hidden, f"2 x {vocabulary} x {hidden}"
    ahead = (matrix + layer, f"{matrix_text} + {layer:,.0f}")
    more = ((copies - 1) * tokens * vocabulary, f"{copies - 1} x {tokens} x {vocabulary}")
    return (
        moment(5 * hidden + vocabulary, f"5 x {hidden} + {vocabulary}", *max(ahead, more)),
        moment(work, str(work), matrix + 3 * layer, f"{matrix_text} + 3 x {layer:,.0f}"),
    )


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


def _scoring(size: ModelSize, config: DictConfig) -> Moment:
    """Logits and the entropy of one chunk: values, softmax and product in float32.

    Compiled, as by default, the entropy may take less.
    """
    tokens, fsdp = tokens_at_once(config), config.actor_rollout_ref.actor.fsdp_config
    chunk = tokens
    if fsdp.entropy_from_logits_with_chunking:
        chunk = min(tokens, fsdp.entropy_from_logits_chunk_size)
    copies = 1 if config.actor_rollout_ref.rollout.temperature == 1 else 2
    return Moment(
        (2 * copies * tokens + 12 * chunk) * size.vocabulary / GIB,
        f"(2 x {copies} x {tokens} + 12 x {chunk} tokens) x {size.vocabulary}",
    )


def host_memory(size: ModelSize, config: DictConfig) -> tuple[float, str]:
    """Memory that one machine needs while the policy is loaded and trained.

    Returns:
        GiB, and the arithmetic.
    """
    parameters, ranks = size.parameters, config.trainer.n_gpus_per_node
    if config.trainer.device == "cpu":
        loss, layer = _backward_moments(size, config, 4)
        shared = 16 * parameters / GIB
        copies = ranks * (4 * parameters / GIB + max(loss.size, layer.size))
        text = (
            f"weights, gradients and Adam 16 P = {shared:.1f}; a rank's rollout 4 P and the larger "
            f"of loss {loss.size:.1f} and layer {layer.size:.1f}, times {ranks} = {copies:.1f}"
        )
        return shared + copies, f"{text}; P = {parameters:,}"
    fsdp = config.actor_rollout_ref.actor.fsdp_config
    # Tied embeddings keep FSDP from loading on one rank only.
    readers = ranks if size.tied else 1
    loading = readers * 4 * parameters / GIB
    here = ranks / cards_a_copy(config)
    kept, text = 0.0, f"loading {readers} x 4 P = {loading:.1f}"
    if fsdp.offload_policy:
        kept = 16 * parameters * here / GIB
        text += f"; weights, gradients and Adam kept there 16 P x {here:g} = {kept:.1f}"
    elif fsdp.param_offload or fsdp.optimizer_offload:
        each = 4 * bool(fsdp.param_offload) + 8 * bool(fsdp.optimizer_offload)
        kept = each * parameters * here / GIB
        text += f"; waiting there while sampling {each} P x {here:g} = {kept:.1f}"
    if config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward:
        # verl's engines keep a policy that is never trained there.
        reference = 4 * parameters * here / GIB
        kept += reference
        text += f"; the reference policy 4 P x {here:g} = {reference:.1f}"
    return max(loading, kept), f"{text}; P = {parameters:,}"


def cpu_slots(config: DictConfig) -> tuple[int, str]:
    """CPUs that Ray must have for the run to start; with fewer it waits without a word.

    Read in verl 0.9.1: three a card, one for each of TransferQueue's storage
    units and one for its controller, one for the driver.

    Returns:
        The number, and the arithmetic.
    """
    gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    units = config.transfer_queue.backend.SimpleStorage.num_data_storage_units
    slots = CPUS_PER_RANK * gpus + units + 1 + 1
    return slots, f"{CPUS_PER_RANK} x {gpus} + TransferQueue {units} + 1 + driver 1 = {slots}"


def arithmetic(memory: CardMemory, size: ModelSize, config: DictConfig) -> str:
    """The estimate as a text with every term."""
    state = f"{size.parameters:,} / {cards_a_copy(config)}"
    moments = [
        f"{name} {moment.size:.1f} ({moment.text})"
        for name, moment in (
            ("loss", memory.loss),
            ("layer", memory.layer),
            ("AdamW's step", memory.step),
            ("scoring, without gradients,", memory.scoring),
        )
    ]
    share = config.actor_rollout_ref.rollout.gpu_memory_utilization
    return (
        f"update {memory.update:.1f} GiB = weights {memory.weights:.1f} (4 x {state}) + gradients "
        f"{memory.gradients:.1f} + Adam {memory.adam:.1f} (8 x {state}) + {OVERHEAD_GIB:g} + the "
        f"largest of {', '.join(moments)}; "
        f"sampling {memory.sampling:.1f} GiB = vLLM {memory.rollout:.1f} ({share:g} of the card) + "
        f"resident {memory.resident:.1f} + {OVERHEAD_GIB:g}; vLLM's cache "
        f"{memory.cache_tokens / 1e6:.1f} M tokens"
    )
