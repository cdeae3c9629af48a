"""The tiny policy's network, and imitation of demonstrations by any causal model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.nn import functional
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from data_prep.policies.demos import IGNORED
from data_prep.policies.tokenizer import END_OF_TEXT, MAX_VALUE, TURN_END, step_part

_PERIODS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 50, 100)
_NUMBER_SCALE = 0.1
_MUON_LR = 0.01
_ADAM_LR = 2e-3
_WEIGHT_DECAY = 0.01
_RAMP_STEPS = 30
_DECAY_FROM = 0.2
_FINAL_LR = 0.03
_WEIGHT_OF_WEIGHTY = 2.0
# The loss is divided by this many tokens a response, about the mean, so that a
# batch of short responses weighs no more than one of long ones.
_RESPONSE_TOKENS = 15.0


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Return an untrained Qwen2 of about 0.15 million float32 parameters."""
    vocabulary = tokenizer.get_vocab()
    ends, pads = vocabulary[TURN_END], vocabulary[END_OF_TEXT]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=pads,
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=ends,
        pad_token_id=pads,
    )
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            _compose_numbers(weight, tokenizer)
    return model


def warm_start(
    model: Qwen2ForCausalLM,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    weighty: Sequence[int],
    progress: Callable[[int], None],
) -> None:
    """Let the tiny policy imitate that many batches; the arguments are those of `train`.

    Matrices inside the layers are updated by Muon (orthogonalised momentum), the
    rest by AdamW: at this size that needs half the steps of AdamW alone.
    """
    inner = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in inner}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    optimizers = [
        torch.optim.Muon(inner, lr=_MUON_LR, weight_decay=_WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=_ADAM_LR, betas=(0.9, 0.95), weight_decay=_WEIGHT_DECAY),
    ]
    train(model, batches, optimizers, ramp_and_fall(steps, _RAMP_STEPS), weighty, progress)


def train(
    model: PreTrainedModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    rate: Callable[[int], float] = lambda step: 1.0,
    weighty: Sequence[int] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Imitate batches of demonstrations, one update each, with gradients of norm 1 at most.

    Args:
        model: A causal model of Hugging Face; trained in place, then put into evaluation mode.
        batches: Inputs and labels, as `demos.token_batch` makes them.
        optimizers: Of all its weights.
        rate: Factor on the learning rates at each step, from 0.
        weighty: Tokens whose loss counts twice.
        progress: Told the number of batches done.
    """
    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    heavy = torch.tensor(weighty, dtype=torch.int64)
    model.train()
    for done, (inputs, labels) in enumerate(batches, start=1):
        model.zero_grad()
        _loss(model, inputs, labels, heavy).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        progress(done)
    model.eval()


def ramp_and_fall(steps: int, ramp: int) -> Callable[[int], float]:
    """Return the factor on the learning rates: a ramp, a plateau, a straight line down."""

    def factor(step: int) -> float:
        left = min(1.0, (1 - step / steps) / (1 - _DECAY_FROM))
        return min(1.0, (step + 1) / ramp) * (_FINAL_LR + (1 - _FINAL_LR) * left)

    return factor


def _loss(
    model: PreTrainedModel, inputs: torch.Tensor, labels: torch.Tensor, weighty: torch.Tensor
) -> torch.Tensor:
    """Return the weighted cross-entropy of a batch, in nats, over `_RESPONSE_TOKENS` a row."""
    # Logits from the first label on: those of the prompts are not needed.
    labels = labels[:, int((labels != IGNORED).any(dim=0).nonzero()[0]) :]
    logits = model(input_ids=inputs, logits_to_keep=labels.shape[1], use_cache=False).logits
    entropy = functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    weighted = torch.where(torch.isin(labels, weighty), _WEIGHT_OF_WEIGHTY * entropy, entropy)
    return weighted.sum() / (len(labels) * _RESPONSE_TOKENS)


def _compose_numbers(weight: torch.Tensor, tokenizer: Qwen2Tokenizer) -> None:
    """Start each token of a step as the sum of its mark and its number.

    Numbers lie on circles of several periods, so that sums are rotations and
    nothing about counting need be learnt token by token.
    """
    number = torch.arange(MAX_VALUE + 1, dtype=torch.float32)
    angles = [2 * math.pi * number / period for period in _PERIODS]
    circles = [wave for angle in angles for wave in (angle.cos(), angle.sin())]
    features = torch.stack([*circles, number / 50 - 1, number.log1p() / 2 - 1], dim=1)
    numbers = _NUMBER_SCALE * features
    initial = weight.clone()
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if part := step_part(token):
            mark, value = part
            vector = initial[i] / 2
            if mark:
                vector = vector + initial[tokenizer.convert_tokens_to_ids(mark)]
            vector[: numbers.shape[1]] += numbers[value]
            weight[i] = vector
