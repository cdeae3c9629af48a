"""Demonstrations of Countdown for the tiny policy.

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

from collections.abc import Collection, Sequence
from itertools import combinations_with_replacement, permutations
from typing import NamedTuple

import torch
from transformers import Qwen2Tokenizer

from data_prep.countdown.prompts import tiny
from data_prep.policies.demos import Demonstrations
from data_prep.policies.tokenizer import ANSWER_CLOSE, ANSWER_OPEN, MAX_NUMBER, MAX_VALUE

NUMBERS = 3
MAX_ATTEMPTS = 3
MAX_RESPONSE_TOKENS = 24
# How often the working author needs one, two or three attempts, and gives up after three.
_ATTEMPT_WEIGHTS = (5, 3, 2)
_GIVES_UP = 0.05

# A puzzle up to order: sorted numbers and target.
PuzzleKey = tuple[tuple[int, ...], int]


class Attempt(NamedTuple):
    """A sum from left to right: its tokens as an answer, and worked out on a line."""

    answer: list[int]
    line: list[int]


class CountdownDemonstrations(Demonstrations):
    """Demonstrations of puzzles with three numbers.

    Args:
        tokenizer: The tiny policy's.
        seed: Any integer.
        held_out: Puzzles that no demonstration poses.
    """

    prompt_tokens = 16

    def __init__(
        self, tokenizer: Qwen2Tokenizer, seed: int, held_out: Collection[PuzzleKey] = ()
    ) -> None:
        super().__init__(tokenizer, seed)
        self._held_out = frozenset(held_out)
        self._open = self._encode(ANSWER_OPEN)
        self._close = [*self._encode(ANSWER_CLOSE), *self._turn_end]
        # A computed value says more than its one token, the rest is partly chance.
        self.weighty_tokens = torch.tensor(
            [self._encode(f"={value}")[0] for value in range(MAX_VALUE + 1)]
        )
        self._attempts = {
            numbers: self._worked(numbers)
            for numbers in combinations_with_replacement(range(1, MAX_NUMBER + 1), NUMBERS)
        }
        self._sets = list(self._attempts)

    def draw(self, direct_share: float) -> tuple[list[int], list[int]]:
        """Return a prompt and a response; the direct author answers without attempts."""
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

    def prompt(self, numbers: Sequence[int], target: int) -> list[int]:
        """Return the prompt's tokens, `prompt_tokens` of them."""
        return self._prompt_of(tiny(numbers, target))

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
