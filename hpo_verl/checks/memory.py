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

from typing import NamedTuple

from omegaconf import DictConfig

from hpo_verl.checks.model_size import ModelSize
from hpo_verl.config.settings import cards_a_copy

GIB = 1 << 30
# CUDA, NCCL, a sleeping vLLM and fragments; likewise beside vLLM's share. GiB.
OVERHEAD_GIB = 4.0
# The cards that the recipes are written for.
RECIPE_CARD_GIB = 80.0
HALF = ("bf16", "bfloat16", "fp16", "float16", "16")


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
    gate = size.query_width if size.delta else 0
    attention = {
        "q_proj": hidden + size.query_width + gate,
        "o_proj": hidden + size.query_width,
        **dict.fromkeys(("k_proj", "v_proj"), hidden + size.key_width),
    }
    feed_forward = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + middle)
    kinds = [(size.attention_layers, attention), (size.layers, feed_forward)]
    if size.delta:
        kinds.append((size.delta.layers, size.delta.adapted(hidden)))
    # A text is `all-linear` or a pattern, of which that is the most.
    every = isinstance(model.target_modules, str)
    return model.lora_rank * sum(
        layers * width
        for layers, widths in kinds
        for name, width in widths.items()
        if every or name in model.target_modules
    )


def trained_parameters(size: ModelSize, config: DictConfig) -> int:
    """Parameters that have a gradient and Adam's moments: the adapter's, or all."""
    return adapter_parameters(size, config) or size.parameters


def card_memory(size: ModelSize, config: DictConfig, card: float) -> CardMemory:
    """Estimate the memory taken in each phase of a card of so many GiB."""
    rollout, fsdp = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor.fsdp_config
    parameters, trained = size.parameters, trained_parameters(size, config)
    stored = _stored_bytes(config) / GIB
    on_card = 0.0 if fsdp.offload_policy else stored / cards_a_copy(config)
    weights = on_card * (parameters + adapter_parameters(size, config))
    whole = fsdp.use_no_sync_for_gradient_accumulation
    share, parallel = card * rollout.gpu_memory_utilization, rollout.tensor_model_parallel_size
    states = size.delta.state_bytes * rollout.max_num_seqs if size.delta else 0
    cache = (share - OVERHEAD_GIB) * GIB - (2 * parameters + states) / parallel
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


def _stored_bytes(config: DictConfig) -> int:
    """Of a value of weights, gradients and moments."""
    dtype = str(config.actor_rollout_ref.actor.fsdp_config.model_dtype)
    return 2 if dtype in HALF else 4


def _head_moments(size: ModelSize, config: DictConfig) -> float:
    """Adam's moments of the output matrix, GiB, where a loss has them whole on every card.

    A card that shares with no other has no second copy of them.
    """
    if cards_a_copy(config) == 1:
        return 0.0
    from hpo_verl.algorithms.registry import LOSSES

    loss = LOSSES.get(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    if loss is None or loss.head_fields is None:
        return 0.0
    return 2 * _stored_bytes(config) * size.vocabulary * size.hidden_size / GIB


def _backward_moments(size: ModelSize, config: DictConfig, width: int) -> tuple[float, float]:
    """The two peaks of the backward pass, GiB; `width` is the bytes of a value.

    A layer saves 4 m + 8 h + 2 q + 2 k values a token: four of the feed-forward, four
    of each of two norms (a float32 value counts twice), query, attention's output,
    key and value; and 3 (q + k) if queries and keys are normalised. A frozen norm keeps
    one value less. Its backward pass takes 2 m + h more at most. Gradient checkpointing
    keeps the layer's input (h) until it is recomputed. In Qwen3.5 a norm that is trained
    keeps one more, attention's gate three of q, and other layers what `DeltaLayers` says.

    Returns:
        - loss: beside what the layers keep, 5 h of the last norm and the logits. Further
          tensors of their size are gone when the vocabulary's matrix comes with its
          gradient and one layer that is fetched ahead: the larger of the two counts.
        - layer: beside what the layers keep, the work on the last one, the matrix with
          its gradient, and three times a layer: itself, its gradient, the next one.
        What is frozen has no gradient in either. Both have what a loss reads of the head.
    """
    tokens, copies = tokens_at_once(config), _logits_copies(config, width)
    hidden, middle, vocabulary = size.hidden_size, size.intermediate_size, size.vocabulary
    adapter = adapter_parameters(size, config)
    frozen = adapter > 0
    heads = size.query_width + size.key_width
    # What a norm keeps of each value beside its output, that of the last layer included.
    norm = (2 if frozen else 4) if size.delta else 3 - frozen
    same = 4 * middle + 2 * (norm + 1) * hidden
    attention = 2 * heads + size.head_norms * norm * heads
    delta, others = (size.delta.saved, size.delta.layers) if size.delta else (0, 0)
    attention += 3 * size.query_width * bool(size.delta)
    kept, work = size.layers * same + size.attention_layers * attention, 2 * middle + hidden
    kept += others * delta
    if config.actor_rollout_ref.model.enable_gradient_checkpointing:
        kept, work = size.layers * hidden, work + same + max(attention, delta)
    matrix = (2 - frozen) * vocabulary * hidden
    layer = size.layer_parameters + adapter / size.layers
    more = max(matrix + layer, (copies - 1) * tokens * vocabulary)
    loss_values = tokens * (kept + 5 * hidden + vocabulary) + more
    layer_values = tokens * (kept + work) + matrix + (3 - frozen) * layer
    head = _head_moments(size, config)
    return head + width * loss_values / GIB, head + width * layer_values / GIB


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
