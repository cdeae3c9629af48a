"""Batched generation with transformers, repeatable bit for bit.

A floating-point matrix product can round differently when its shape changes. Every forward pass
here therefore has one of a few fixed shapes: rows are padded to `block_rows` and prompts to a
multiple of `PROMPT_MULTIPLE`, which depends on the row alone; and one thread computes it, since
several share its rows out by position. With noise that is seeded per request, a response then
depends only on the weights, its own prompt and its own seed. Blocks run side by side instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from hpo_verl.core.settings import require_number
from hpo_verl.errors import ConfigError

PROMPT_MULTIPLE = 8


def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a given uniform.

    The draw depends on nothing but its own row of logits, `[batch, vocabulary]`, and its uniform in
    [0, 1), so neither the order nor the company of requests changes a sample. A temperature of 0
    means greedy; `top_k` below 1 keeps the whole vocabulary; `top_p` works within the top-k.

    Returns:
        Tokens `[batch]`, and their log-probabilities `[batch]` in nats, float32, under the
        distribution that they were drawn from (greedy: at temperature 1, unrestricted).
    """
    scaled: Any = logits.double() / (temperature or 1.0)
    if temperature == 0:
        token = logits.argmax(dim=-1)
        log_prob = scaled.log_softmax(dim=-1)
    else:
        no_tokens_before: Any = None
        if top_k >= 1:
            scaled = TopKLogitsWarper(top_k)(no_tokens_before, scaled)
        if top_p < 1:
            scaled = TopPLogitsWarper(top_p)(no_tokens_before, scaled)
        log_prob = scaled.log_softmax(dim=-1)
        probability = log_prob.exp()
        cumulative = probability.cumsum(dim=-1)
        target = uniforms.double() * cumulative[:, -1]
        drawn = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
        # Rounding may carry the target up to the last cumulative value.
        last_possible = logits.shape[-1] - 1 - (probability > 0).flip(-1).int().argmax(dim=-1)
        token = torch.minimum(drawn, last_possible)
    return token, log_prob.gather(-1, token[:, None]).squeeze(-1).float()


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue, with the seed of its noise; see `sample_tokens`."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_number("sampling parameter max_tokens", self.max_tokens, 0)
        require_number("sampling parameter temperature", self.temperature, 0)
        require_number("sampling parameter top_p", self.top_p, 0, 1, open_low=True)
        if not self.prompt_ids:
            raise ConfigError("sampling parameter prompt_ids: must be at least one token")

    @property
    def sampling(self) -> tuple[float, int, float]:
        """Temperature, top-k and top-p."""
        return self.temperature, self.top_k, self.top_p

    @property
    def padded_prompt_length(self) -> int:
        """Prompt length rounded up to a multiple of `PROMPT_MULTIPLE` (tokens).

        At least one place stays padding: transformers takes another attention
        kernel for a block without any, and would round differently.
        """
        return (len(self.prompt_ids) // PROMPT_MULTIPLE + 1) * PROMPT_MULTIPLE


@dataclass(frozen=True)
class GenerationResult:
    """Tokens of one response, EOS included, and their log-probabilities in nats."""

    token_ids: list[int]
    log_probs: list[float]
    finished: bool


class BatchGenerator:
    """Continues prompts with a KV cache, in blocks of equal shape, `num_threads` at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        block_rows: int,
        num_threads: int = 1,
    ) -> None:
        torch.set_num_threads(1)
        self.model = model
        self.eos_token_ids = torch.tensor(sorted(set(eos_token_ids)))
        self.pad_token_id = pad_token_id
        self.block_rows = block_rows
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="generation")

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[GenerationResult]:
        """Continue every request, in their order, until `should_stop`, asked before every token."""
        alike: dict[tuple[int, tuple[float, int, float]], list[int]] = {}
        for position, request in enumerate(requests):
            alike.setdefault((request.padded_prompt_length, request.sampling), []).append(position)
        blocks = [
            positions[start : start + self.block_rows]
            for _, positions in sorted(alike.items())
            for start in range(0, len(positions), self.block_rows)
        ]
        answers = self._threads.map(
            lambda block: self._generate_block([requests[i] for i in block], should_stop),
            blocks,
        )
        results: dict[int, GenerationResult] = {}
        for block, block_answers in zip(blocks, answers, strict=True):
            results.update(zip(block, block_answers, strict=True))
        return [results[position] for position in range(len(requests))]

    @torch.inference_mode()
    def _generate_block(
        self,
        requests: Sequence[GenerationRequest],
        should_stop: Callable[[], bool],
    ) -> list[GenerationResult]:
        rows, live = self.block_rows, len(requests)
        padded_prompt_length = requests[0].padded_prompt_length
        max_tokens = max(request.max_tokens for request in requests)
        input_ids = torch.full((rows, padded_prompt_length), self.pad_token_id)
        attention_mask = torch.zeros((rows, padded_prompt_length + max_tokens), dtype=torch.long)
        uniforms = torch.zeros((rows, max_tokens), dtype=torch.float64)
        limit = torch.zeros(rows, dtype=torch.long)
        # Rows beyond the live ones repeat a valid prompt pattern: one attended token.
        attention_mask[live:, padded_prompt_length - 1] = 1
        generator = torch.Generator()
        for row, request in enumerate(requests):
            length = len(request.prompt_ids)
            input_ids[row, padded_prompt_length - length :] = torch.tensor(request.prompt_ids)
            attention_mask[row, padded_prompt_length - length : padded_prompt_length] = 1
            generator.manual_seed(request.seed)
            uniforms[row, : request.max_tokens] = torch.rand(
                request.max_tokens, dtype=torch.float64, generator=generator
            )
            limit[row] = request.max_tokens

        tokens = torch.full((rows, max_tokens), self.pad_token_id)
        log_probs = torch.zeros((rows, max_tokens))
        length = torch.zeros(rows, dtype=torch.long)
        done = limit == 0
        cache = None
        position_ids = (attention_mask[:, :padded_prompt_length].cumsum(-1) - 1).clamp(min=0)
        for step in range(max_tokens):
            if bool(done.all()) or should_stop():
                break
            seen = padded_prompt_length + step
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask[:, :seen],
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            token, log_prob = sample_tokens(logits, uniforms[:, step], *requests[0].sampling)
            tokens[:, step] = torch.where(done, self.pad_token_id, token)
            log_probs[:, step] = log_prob
            length += ~done
            done |= torch.isin(token, self.eos_token_ids) | (length >= limit)
            attention_mask[:, seen] = 1
            input_ids = tokens[:, step : step + 1]
            position_ids = position_ids[:, -1:] + 1
        return [
            GenerationResult(
                token_ids=tokens[row, : length[row]].tolist(),
                log_probs=log_probs[row, : length[row]].tolist(),
                finished=bool(done[row]),
            )
            for row in range(live)
        ]
