"""Batched generation with transformers, repeatable bit for bit.

A floating-point matrix product can round differently when its shape changes. Every forward pass
here therefore has one of a few fixed shapes, whatever it holds: `block_rows` tokens that continue
responses, or twice as many of short prompts; a longer prompt is read alone. Attention is computed
for each sequence by itself, and one thread computes a pass, since several share its rows out by
position. With noise that is seeded per request, a response then depends only on the weights, its
own prompt and its own seed. Passes of several threads run side by side instead.

A response that ends makes room for the next one, and responses to one prompt share its reading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel

from hpo_verl.algorithms.base import TokenTemperature
from hpo_verl.core.settings import require_number
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.cpu import attention
from hpo_verl.verl_plugin.cpu.sampling import sample_tokens

# Below so many parameters the calls of a pass cost more than its arithmetic.
SMALL_MODEL = 10_000_000
# Rows of a pass of a larger model: enough to be fast, and few enough to be full. A token of
# SmolLM2-135M takes 1.15 times as long as with 256.
ROWS = 32
# Vector instructions take so many rows at once; a pass of fewer rounds them in another way.
ROW_MULTIPLE = 16
# Responses enter when this share of a block is free, so that their prompts are read together.
_FREE_SHARE = 8

Sampling = tuple[float, int, float, TokenTemperature | None]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue, with the seed of its noise; see `sample_tokens`."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    token_temperature: TokenTemperature | None = None

    def __post_init__(self) -> None:
        require_number("sampling parameter max_tokens", self.max_tokens, 0)
        require_number("sampling parameter temperature", self.temperature, 0)
        require_number("sampling parameter top_p", self.top_p, 0, 1, open_low=True)
        if not self.prompt_ids:
            raise ConfigError("sampling parameter prompt_ids: must be at least one token")

    @property
    def sampling(self) -> Sampling:
        """Temperature, top-k, top-p, and a rule for the temperature of every token."""
        return self.temperature, self.top_k, self.top_p, self.token_temperature


@dataclass(frozen=True)
class GenerationResult:
    """Tokens of one response, EOS included, and their log-probabilities in nats."""

    token_ids: list[int]
    log_probs: list[float]
    finished: bool


class BatchGenerator:
    """Continues prompts with a cache of keys and values, `num_threads` blocks at a time.

    Args:
        model: A causal model whose layers all attend to everything before a token.
        eos_token_ids: Tokens that end a response.
        pad_token_id: Stands in rows that hold nothing.
        block_rows: Most responses that a thread continues at once. Repeatable, a larger model takes
            `ROWS` at most, and the number is rounded up to a multiple of `ROW_MULTIPLE`.
        num_threads: Blocks that are computed side by side.
        repeatable: Whether every pass has the same shape. Without it a pass holds no empty row,
            and a response may depend on its company in its last bits, and so in its tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        block_rows: int,
        num_threads: int = 1,
        repeatable: bool = True,
    ) -> None:
        torch.set_num_threads(1)
        self.model = model
        self.eos_token_ids = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long)
        self.pad_token_id = pad_token_id
        if repeatable and model.num_parameters() >= SMALL_MODEL:
            block_rows = min(block_rows, ROWS)
        if repeatable:
            block_rows = -(-block_rows // ROW_MULTIPLE) * ROW_MULTIPLE
        self.block_rows = block_rows
        self.repeatable = repeatable
        self.num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="generation")
        attention.use(model)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[GenerationResult]:
        """Continue every request, in their order, until `should_stop`, asked before every token."""
        results = [GenerationResult([], [], request.max_tokens == 0) for request in requests]
        # Equal lengths stand together, since their attention is computed together.
        order = sorted(
            (position for position, request in enumerate(requests) if request.max_tokens),
            key=lambda i: (len(requests[i].prompt_ids), requests[i].prompt_ids),
        )
        waiting = deque(order)
        places = self.block_rows
        if not self.repeatable:
            places = min(places, -(-len(order) // self.num_threads))
        workers = min(self.num_threads, -(-len(order) // max(1, places)))
        blocks = [_Block(self, requests, results, waiting, places) for _ in range(workers)]
        for _ in self._threads.map(lambda block: block.run(should_stop), blocks):
            pass
        return results

    def forward(
        self, network: Any, tokens: torch.Tensor, positions: torch.Tensor, rows: int, sequences: Any
    ) -> Any:
        """Run the model, or a part, on tokens that stand side by side, padded to a number of rows.

        `sequences` computes the attention.
        """
        padded = torch.full((1, rows), self.pad_token_id)
        at = torch.zeros((1, rows), dtype=torch.long)
        padded[0, : len(tokens)] = tokens
        at[0, : len(tokens)] = positions
        return network(
            input_ids=padded,
            position_ids=at,
            # Of four dimensions, it is passed on to attention, which has no use for it.
            attention_mask=torch.zeros(1, 1, 1, 1),
            use_cache=False,
            sequences=sequences,
        )


class _Block:
    """Responses that one thread continues together; more come from `waiting` as some end."""

    def __init__(
        self,
        generator: BatchGenerator,
        requests: Sequence[GenerationRequest],
        results: list[GenerationResult],
        waiting: deque[int],
        places: int,
    ) -> None:
        self._generator = generator
        self._requests = requests
        self._results = results
        self._waiting = waiting
        wanted = [requests[position] for position in waiting]
        places = min(places, len(wanted))
        self._free = list(range(places))
        self._cache = attention.Cache(
            places, max(len(request.prompt_ids) + request.max_tokens for request in wanted)
        )
        # Of each place: the position of its request, or -1; its last token and how many came
        # before it; and the response so far.
        self._request = torch.full((places,), -1)
        self._last = torch.zeros(places, dtype=torch.long)
        self._before = torch.zeros(places, dtype=torch.long)
        self._made = torch.zeros(places, dtype=torch.long)
        self._limit = torch.zeros(places, dtype=torch.long)
        longest = max(request.max_tokens for request in wanted)
        self._tokens = torch.zeros((places, longest), dtype=torch.long)
        self._log_probs = torch.zeros((places, longest))
        self._uniforms = torch.zeros((places, longest), dtype=torch.float64)
        # The live places in order of length, and those of equal settings as part of the order.
        self._live = torch.empty(0, dtype=torch.long)
        self._settings: list[tuple[Sampling, torch.Tensor]] = []
        # The last prompts that were read, and where.
        self._read: dict[tuple[int, ...], tuple[attention.Prompts, int]] = {}

    @torch.inference_mode()
    def run(self, should_stop: Callable[[], bool]) -> None:
        """Continue requests until none waits."""
        while not should_stop():
            places = len(self._request)
            if len(self._free) >= -(-places // _FREE_SHARE) or not len(self._live):
                self._admit()
            if not len(self._live):
                return
            self._step()
        self._finish(self._live, finished=False)

    def _admit(self) -> None:
        """Fill free places."""
        entering: list[int] = []
        while len(entering) < len(self._free):
            try:
                entering.append(self._waiting.popleft())
            except IndexError:
                break
        if not entering:
            return
        self._read_prompts(entering)
        generator = torch.Generator()
        copies: dict[int, tuple[attention.Prompts, list[int], list[int]]] = {}
        self._free.sort()
        taken, self._free = self._free[: len(entering)], self._free[len(entering) :]
        for position, place in zip(entering, taken, strict=True):
            request = self._requests[position]
            self._request[place] = position
            self._last[place] = request.prompt_ids[-1]
            self._before[place] = len(request.prompt_ids) - 1
            self._made[place] = 0
            self._limit[place] = request.max_tokens
            generator.manual_seed(request.seed)
            self._uniforms[place, : request.max_tokens] = torch.rand(
                request.max_tokens, dtype=torch.float64, generator=generator
            )
            if len(request.prompt_ids) > 1:
                group, index = self._read[request.prompt_ids[:-1]]
                _, to, which = copies.setdefault(id(group), (group, [], []))
                to.append(place)
                which.append(index)
        for group, to, which in copies.values():
            self._cache.fill(torch.tensor(to), group, torch.tensor(which))
        # Of all that were read, only the last can be wanted again.
        last = self._requests[entering[-1]].prompt_ids[:-1]
        self._read = {last: self._read[last]} if last else {}
        self._arrange()

    def _read_prompts(self, entering: Sequence[int]) -> None:
        """Read each prompt once, but for its last token, from which the response starts."""
        new = {self._requests[position].prompt_ids[:-1]: None for position in entering}
        prompts = [prompt for prompt in new if prompt and prompt not in self._read]
        most = 2 * self._generator.block_rows
        while prompts:
            count, tokens = 1, len(prompts[0])
            while count < len(prompts) and tokens + len(prompts[count]) <= most:
                tokens += len(prompts[count])
                count += 1
            together, prompts = prompts[:count], prompts[count:]
            groups = [
                attention.Prompts(length, list(alike)) for length, alike in groupby(together, len)
            ]
            self._generator.forward(
                self._generator.model.base_model,
                torch.tensor([token for prompt in together for token in prompt]),
                torch.cat([torch.arange(len(prompt)) for prompt in together]),
                max(tokens, most) if self._generator.repeatable else tokens,
                attention.PromptPass(groups),
            )
            for group in groups:
                self._read.update((p, (group, i)) for i, p in enumerate(group.prompts))

    def _arrange(self) -> None:
        """Put the live places in order."""
        live = (self._request >= 0).nonzero().squeeze(-1)
        self._live = live[self._before[live].argsort(stable=True)]
        rows: dict[Sampling, list[int]] = {}
        for row, position in enumerate(self._request[self._live].tolist()):
            rows.setdefault(self._requests[position].sampling, []).append(row)
        self._settings = [(settings, torch.tensor(those)) for settings, those in rows.items()]

    def _step(self) -> None:
        """Add a token to every live response."""
        live, generator = self._live, self._generator
        before, made = self._before[live], self._made[live]
        self._cache.begin(live, before)
        rows = generator.block_rows if generator.repeatable else len(live)
        output = generator.forward(generator.model, self._last[live], before, rows, self._cache)
        uniforms = self._uniforms[live, made]
        for settings, those in self._settings:
            logits = output.logits[0, those].float()
            token, log_prob = sample_tokens(logits, uniforms[those], *settings)
            at = (live[those], made[those])
            self._tokens[at] = self._last[at[0]] = token
            self._log_probs[at] = log_prob
        self._before[live] += 1
        self._made[live] += 1
        ended = torch.isin(self._last[live], generator.eos_token_ids)
        ended |= made + 1 >= self._limit[live]
        if bool(ended.any()):
            self._finish(live[ended], finished=True)
            self._arrange()

    def _finish(self, places: torch.Tensor, *, finished: bool) -> None:
        """Write down the responses of places, and free these."""
        for place, position, made in zip(
            places.tolist(),
            self._request[places].tolist(),
            self._made[places].tolist(),
            strict=True,
        ):
            self._results[position] = GenerationResult(
                self._tokens[place, :made].tolist(),
                self._log_probs[place, :made].tolist(),
                finished,
            )
            self._free.append(place)
        self._request[places] = -1
