"""The demonstrations that the tiny policy is warm-started on.

Two authors answer puzzles such as `3 7 2 = 8`. One works them out in up to three
attempts of different value, adding and subtracting from left to right, and answers
with the last:

    3+7=10-2=8
    <answer>3+7-2</answer>

The other answers at once with any three numbers in a row and any of the four
operators, right by chance only. Most demonstrations are his, so the policy that
imitates both is seldom right, yet can do better; to find that out is left to
reinforcement learning.

No solver is asked. Attempts are drawn blindly, and the target is then set to the
value of the last one (hindsight), except where the author gives up after three.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from itertools import combinations_with_replacement, permutations
from typing import NamedTuple

import torch
from transformers import Qwen2Tokenizer

from data_prep.countdown_prompts import tiny
from data_prep.tiny_tokenizer import ANSWER_CLOSE, ANSWER_OPEN, MAX_NUMBER, MAX_VALUE, TURN_END

NUMBERS = 3
MAX_ATTEMPTS = 3
MAX_PROMPT_TOKENS = 16
MAX_RESPONSE_TOKENS = 24
IGNORED = -100
# How often the working author needs one, two or three attempts, and gives up after three.
_ATTEMPT_WEIGHTS = (5, 3, 2)
_GIVES_UP = 0.05
# Batches that are drawn together and sorted by length, to waste little on padding.
_SORTED_TOGETHER = 4

# A puzzle up to order: sorted numbers and target.
PuzzleKey = tuple[tuple[int, ...], int]


class Attempt(NamedTuple):
    """A sum from left to right: its tokens as an answer, and worked out on a line."""

    answer: list[int]
    line: list[int]


class Demonstrations:
    """Draws demonstrations; the same arguments and calls give the same ones.

    Args:
        tokenizer: The tiny policy's.
        seed: Any integer.
        held_out: Puzzles that no demonstration poses.

    Attributes:
        value_tokens: The tokens `=0` to `=45`, a worked step's value.
    """

    def __init__(
        self, tokenizer: Qwen2Tokenizer, seed: int, held_out: Collection[PuzzleKey] = ()
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._tokenizer = tokenizer
        self._held_out = frozenset(held_out)
        self._open = self._encode(ANSWER_OPEN)
        self._close = [*self._encode(ANSWER_CLOSE), *self._encode(TURN_END)]
        self.value_tokens = torch.tensor([self._encode(f"={v}")[0] for v in range(MAX_VALUE + 1)])
        self._attempts = {
            numbers: self._worked(numbers)
            for numbers in combinations_with_replacement(range(1, MAX_NUMBER + 1), NUMBERS)
        }
        self._sets = list(self._attempts)

    def batches(
        self, steps: int, size: int, direct_share: float
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches of prompts with responses, padded to the longest of each batch.

        Args:
            steps: How many batches.
            size: Demonstrations in a batch.
            direct_share: Share of demonstrations that answer at once, without attempts.

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

    def draw(self, direct_share: float) -> tuple[list[int], list[int]]:
        """Return the tokens of one prompt and of its response, up to `<|im_end|>`."""
        while True:
            numbers = self._random.choice(self._sets)
            attempts = self._attempts[numbers]
            values = self._random.sample(list(attempts), min(MAX_ATTEMPTS, len(attempts)))
            untried = [value for value in attempts if value not in values]
            direct = self._random.random() < direct_share
            if direct:
                target = self._random.choice(list(attempts))
            elif untried and self._random.random() < _GIVES_UP:
                target = self._random.choice(untried)
            else:
                (count,) = self._random.choices(
                    range(1, len(values) + 1), _ATTEMPT_WEIGHTS[: len(values)]
                )
                values = values[:count]
                target = values[-1]
            if target > 0 and (numbers, target) not in self._held_out:
                break
        shown = self._random.sample(numbers, NUMBERS)
        if direct:
            lines, answer = [], self._blind(numbers)
        else:
            worked = [self._random.choice(attempts[value]) for value in values]
            lines, answer = (
                [token for attempt in worked for token in attempt.line],
                worked[-1].answer,
            )
        return self.prompt(shown, target), [*lines, *self._open, *answer, *self._close]

    def prompt(self, numbers: list[int], target: int) -> list[int]:
        """Return the prompt's tokens, `MAX_PROMPT_TOKENS` of them, as verl builds them."""
        tokens = self._tokenizer.apply_chat_template(
            tiny(numbers, target), add_generation_prompt=True, return_dict=False
        )
        return list(tokens)  # pyright: ignore[reportReturnType]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _padded(
        self, pairs: list[tuple[list[int], list[int]]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(prompt) + len(response) for prompt, response in pairs)
        tokens = torch.full((len(pairs), longest), self._close[-1])
        labels = torch.full((len(pairs), longest), IGNORED)
        for i, (prompt, response) in enumerate(pairs):
            end = len(prompt) + len(response)
            tokens[i, :end] = torch.tensor(prompt + response)
            labels[i, len(prompt) : end] = torch.tensor(response)
        return tokens[:, :-1], labels[:, 1:]

    def _blind(self, numbers: tuple[int, ...]) -> list[int]:
        a, b, c = self._random.sample(numbers, NUMBERS)
        first, second = self._random.choices("+-*/", k=2)
        return self._encode(f"{a}{first}{b}{second}{c}")

    def _worked(self, numbers: tuple[int, ...]) -> dict[int, list[Attempt]]:
        """Return every sum and difference of the numbers without a negative step, by value."""
        found: dict[int, list[Attempt]] = {}
        # sorted: the order of a set of tuples is not promised.
        for a, b, c in sorted(set(permutations(numbers))):
            for first, partial in (("+", a + b), ("-", a - b)):
                for second, value in (("+", partial + c), ("-", partial - c)):
                    if min(partial, value) >= 0:
                        answer = self._encode(f"{a}{first}{b}{second}{c}")
                        line = self._encode(f"{a}{first}{b}={partial}{second}{c}={value}\n")
                        found.setdefault(value, []).append(Attempt(answer, line))
        return found
