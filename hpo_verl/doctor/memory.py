"""How much memory a run needs, by the arithmetic of recipes/README.md.

Everything here is an estimate, none of it measured on a GPU. P parameters, G
cards over which weights are sharded, T tokens a card holds at once, h hidden
size, m intermediate size, L layers, V vocabulary, b bytes a value (2 in
bfloat16, 4 in float32).
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from hpo_verl.doctor.model_size import ModelSize
from hpo_verl.launch.cluster import cards_a_copy

GIB = 1 << 30
# CUDA, NCCL, a sleeping vLLM and fragments; likewise beside vLLM's share. GiB.
OVERHEAD_GIB = 4.0
# The cards that the recipes are written for.
RECIPE_CARD_GIB = 80.0
ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


@dataclass(frozen=True)
class CardMemory:
    """Memory of one card in the phases of a step, GiB.

    Attributes:
        weights: 4 P / G, float32.
        gradients: 4 P / G.
        adam: 8 P / G, two moments.
        reference: 4 P / G of a reference policy; 0 without one.
        gathered: 2 b values of the largest pieces that are whole at a time, the
            vocabulary's matrices and one layer, with their gradients.
        activations: b T (h L + 3 m + 8 h) with gradient checkpointing, b T L (3 m + 8 h) without.
        logits: 2 b T V, values and gradients.
        resident: what stays on the card while responses are sampled.
        rollout: vLLM's share.
        cache_tokens: tokens that vLLM's cache holds beside its weights.
    """

    weights: float
    gradients: float
    adam: float
    reference: float
    gathered: float
    activations: float
    logits: float
    resident: float
    rollout: float
    cache_tokens: float

    @property
    def update(self) -> float:
        """The update's peak, GiB."""
        parts = (self.weights, self.gradients, self.adam, self.reference)
        return sum(parts) + self.gathered + self.activations + self.logits + OVERHEAD_GIB

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
    away = host or bool(fsdp.param_offload and fsdp.optimizer_offload)
    gpus, parameters = cards_a_copy(config), size.parameters
    weights, gradients, adam = (
        0.0 if host else bytes_each * parameters / gpus / GIB for bytes_each in (4, 4, 8)
    )
    share = card * rollout.gpu_memory_utilization
    tensor_parallel = rollout.tensor_model_parallel_size
    cache = share * GIB - 2 * parameters / tensor_parallel - OVERHEAD_GIB * GIB
    reference = 4 * parameters / gpus / GIB if has_reference(config) else 0.0
    return CardMemory(
        weights=weights,
        gradients=gradients,
        adam=adam,
        reference=reference,
        **_working_memory(size, config, 2),
        resident=reference + (0.0 if away else weights + adam),
        rollout=share,
        cache_tokens=cache / (size.cache_bytes_per_token / tensor_parallel),
    )


def _working_memory(size: ModelSize, config: DictConfig, width: int) -> dict[str, float]:
    """What a rank needs beside its shards, GiB; `width` is the bytes of a value."""
    tokens = tokens_at_once(config)
    hidden, middle = size.hidden_size, size.intermediate_size
    layer = 3 * middle + 8 * hidden
    if config.actor_rollout_ref.model.enable_gradient_checkpointing:
        kept = hidden * size.layers + layer
    else:
        kept = layer * size.layers
    return {
        "gathered": 2 * width * (size.embedding_parameters + size.layer_parameters) / GIB,
        "activations": width * tokens * kept / GIB,
        "logits": 2 * width * tokens * size.vocabulary / GIB,
    }


def has_reference(config: DictConfig) -> bool:
    """Whether a reference policy stays on the cards."""
    needed = config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
    away = OmegaConf.select(config, "actor_rollout_ref.ref.fsdp_config.param_offload")
    return bool(needed) and not away


def host_memory(size: ModelSize, config: DictConfig) -> tuple[float, str]:
    """Memory that one machine needs while the policy is loaded and trained.

    Returns:
        GiB, and the arithmetic.
    """
    parameters, ranks = size.parameters, config.trainer.n_gpus_per_node
    if config.trainer.device == "cpu":
        work = _working_memory(size, config, 4)
        shared = 16 * parameters / GIB
        copies = ranks * (4 * parameters / GIB + sum(work.values()))
        text = (
            f"weights, gradients and Adam 16 P = {shared:.1f}; a rank's rollout 4 P, gathered "
            f"{work['gathered']:.1f}, activations {work['activations']:.1f} and logits "
            f"{work['logits']:.1f}, times {ranks} = {copies:.1f}"
        )
        return shared + copies, f"{text}; P = {parameters:,}"
    fsdp = config.actor_rollout_ref.actor.fsdp_config
    # Tied embeddings keep FSDP from loading on one rank only.
    readers = ranks if size.tied else 1
    loading = readers * 4 * parameters / GIB
    # Machines that share one copy.
    nodes = cards_a_copy(config) / ranks
    kept, text = 0.0, f"loading {readers} x 4 P = {loading:.1f}"
    if fsdp.offload_policy:
        kept = 16 * parameters / nodes / GIB
        text += f"; weights, gradients and Adam kept there 16 P / {nodes:g} = {kept:.1f}"
    elif fsdp.param_offload or fsdp.optimizer_offload:
        each = 4 * bool(fsdp.param_offload) + 8 * bool(fsdp.optimizer_offload)
        kept = each * parameters / nodes / GIB
        text += f"; waiting there while sampling {each} P / {nodes:g} = {kept:.1f}"
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
    slots = 3 * gpus + units + 1 + 1
    return slots, f"3 x {gpus} + TransferQueue {units} + 1 + driver 1 = {slots}"


def arithmetic(memory: CardMemory, size: ModelSize, config: DictConfig) -> str:
    """The estimate as a text with every term."""
    tokens, gpus = tokens_at_once(config), cards_a_copy(config)
    hidden, middle, layers = size.hidden_size, size.intermediate_size, size.layers
    layer = f"3 x {middle} + 8 x {hidden}"
    if config.actor_rollout_ref.model.enable_gradient_checkpointing:
        kept = f"({hidden} x {layers} + {layer})"
    else:
        kept = f"({layer}) x {layers}"
    state = f"{size.parameters:,} / {gpus}"
    terms = [
        f"weights {memory.weights:.1f} (4 x {state})",
        f"gradients {memory.gradients:.1f} (4 x {state})",
        f"Adam {memory.adam:.1f} (8 x {state})",
        f"gathered {memory.gathered:.1f} (4 x ({size.embedding_parameters:,} + one layer))",
        f"activations {memory.activations:.1f} (2 x {tokens} tokens x {kept})",
        f"logits {memory.logits:.1f} (4 x {tokens} x {size.vocabulary})",
        f"{OVERHEAD_GIB:g}",
    ]
    if memory.reference:
        terms.insert(3, f"reference {memory.reference:.1f} (4 x {state})")
    share = config.actor_rollout_ref.rollout.gpu_memory_utilization
    return (
        f"update {memory.update:.1f} GiB = {' + '.join(terms)}; "
        f"sampling {memory.sampling:.1f} GiB = vLLM {memory.rollout:.1f} ({share:g} of the card) + "
        f"resident {memory.resident:.1f} + {OVERHEAD_GIB:g}; vLLM's cache "
        f"{memory.cache_tokens / 1e6:.1f} M tokens"
    )
