"""Demonstrations for the tiny policy's warm start, in batches.

Each task draws its own: `tiny_demos_countdown`, `tiny_demos_telelogs`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from transformers import Qwen2Tokenizer

from data_prep.policies.tokenizer import TURN_END

IGNORED = -100
# Batches that are drawn together and sorted by length, to waste little on padding.
_SORTED_TOGETHER = 4

Message = dict[str, str]


class Demonstrations(ABC):
    """Draws demonstrations; the same arguments and calls give the same ones.

    Args:
        tokenizer: The tiny policy's.
        seed: Any integer.

    Attributes:
        prompt_tokens: Length of the shortest prompt, tokens.
        weighty_tokens: Tokens whose loss counts more than that of others.
    """

    prompt_tokens: int

    def __init__(self, tokenizer: Qwen2Tokenizer, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._tokenizer = tokenizer
        self._turn_end = self._encode(TURN_END)
        self.weighty_tokens = torch.tensor([], dtype=torch.int64)

    @abstractmethod
    def draw(self, direct_share: float) -> tuple[list[int], list[int]]:
        """Return the tokens of one prompt and of its response, up to `<|im_end|>`.

        Args:
            direct_share: Share of demonstrations whose answer is a guess.
        """

    def batches(
        self, steps: int, size: int, direct_share: float
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches of prompts with responses, padded to the longest of each batch.

        Args:
            steps: How many batches.
            size: Demonstrations in a batch.
            direct_share: Share of demonstrations whose answer is a guess.

        Yields:
            Input tokens and labels, both int64 (size, longest); labels are shifted by
            one and `IGNORED` at the prompt and the padding.
        """
        queue: list[list[tuple[list[int], list[int]]]] = []
        for _ in range(steps):
            if not queue:
                drawn = [self.draw(direct_share) for _ in range(size * _SORTED_TOGETHER)]
                drawn.sort(key=lambda pair: len(pair[1]))
                queue = [drawn[i : i + size] for i in range(0, len(drawn), size)]
                self._random.shuffle(queue)
            yield self._padded(queue.pop())

    def _prompt_of(self, messages: list[Message]) -> list[int]:
        """Return the prompt's tokens as verl builds them."""
        tokens = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return list(tokens)  # pyright: ignore[reportReturnType]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _padded(
        self, pairs: list[tuple[list[int], list[int]]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(prompt) + len(response) for prompt, response in pairs)
        tokens = torch.full((len(pairs), longest), self._turn_end[0])
        labels = torch.full((len(pairs), longest), IGNORED)
        for i, (prompt, response) in enumerate(pairs):
            end = len(prompt) + len(response)
            tokens[i, :end] = torch.tensor(prompt + response)
            labels[i, len(prompt) : end] = torch.tensor(response)
        return tokens[:, :-1], labels[:, 1:]
