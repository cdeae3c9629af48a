"""Demonstrations for the warm start of a policy, drawn as text and batched as tokens."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

IGNORED = -100
# Batches that are drawn together and sorted by length, to waste little on padding.
_SORTED_TOGETHER = 4


class Demonstration(NamedTuple):
    """A conversation and a response to imitate, without the token that ends it."""

    messages: list[dict[str, str]]
    response: str


class Demonstrations(ABC):
    """Draws demonstrations of a task; the same seed and calls give the same ones."""

    # Texts of the tokens whose loss counts more than that of others.
    weighty: tuple[str, ...] = ()

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret

    @abstractmethod
    def draw(self, direct_share: float) -> Demonstration:
        """Draw one demonstration; a share `direct_share` of them answers with a guess."""

    def batches(
        self, tokenizer: PreTrainedTokenizerBase, steps: int, size: int, direct_share: float
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `steps` batches of `size` demonstrations, as `token_batch` makes them."""
        queue: list[list[tuple[list[int], list[int]]]] = []
        for _ in range(steps):
            if not queue:
                drawn = [
                    encode(tokenizer, self.draw(direct_share))
                    for _ in range(size * _SORTED_TOGETHER)
                ]
                drawn.sort(key=lambda pair: len(pair[1]))
                queue = [drawn[i : i + size] for i in range(0, len(drawn), size)]
                self._random.shuffle(queue)
            yield token_batch(queue.pop())


def encode(tokenizer: PreTrainedTokenizerBase, shown: Demonstration) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt, as verl builds it, and of its response, ended."""
    prompt = tokenizer.apply_chat_template(
        shown.messages, add_generation_prompt=True, return_dict=False
    )
    response = tokenizer.encode(shown.response, add_special_tokens=False)
    return list(prompt), [*response, tokenizer.eos_token_id]  # pyright: ignore


def token_batch(
    pairs: Sequence[tuple[list[int], list[int]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts with their responses on the right.

    Args:
        pairs: Tokens of each prompt and of its response, whose last token ends it.

    Returns:
        Input tokens and labels, both int64 (pairs, longest - 1); labels are shifted by one
        and `IGNORED` at the prompt and the padding.
    """
    tokens = [torch.tensor(prompt + response) for prompt, response in pairs]
    labels = [torch.tensor([IGNORED] * len(prompt) + response) for prompt, response in pairs]
    end = pairs[0][1][-1]
    return (
        pad_sequence(tokens, batch_first=True, padding_value=end)[:, :-1],
        pad_sequence(labels, batch_first=True, padding_value=IGNORED)[:, 1:],
    )
