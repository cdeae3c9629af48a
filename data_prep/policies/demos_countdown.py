"""Demonstrations of Countdown for the tiny policy.

Two authors answer puzzles such as `3 7 2 = 8`. One works them out in up to three
attempts of different value, adding and subtracting from left to right, and answers
with the last:

    3+7=10-2=8
    <answer>3+7-2</answer>

The other answers at once with the numbers in any order and any of the four
operators, right by chance only. Most demonstrations are his, so the policy that
imitates both is seldom right, yet can do better; to find that out is left to
reinforcement learning.

No solver is asked. Attempts are drawn blindly, and the target is then set to the
value of the last one (hindsight), except where the author gives up after three.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from itertools import combinations_with_replacement, permutations, product
from typing import NamedTuple

from data_prep.countdown.prompts import tiny
from data_prep.countdown.puzzles import PuzzleKey
from data_prep.policies.demos import Demonstration, Demonstrations
from data_prep.policies.tokenizer import ANSWER_CLOSE, ANSWER_OPEN, MAX_NUMBER, MAX_VALUE

MAX_ATTEMPTS = 3
MAX_RESPONSE_TOKENS = 24
# How often the working author needs one, two or three attempts, and gives up after three.
_ATTEMPT_WEIGHTS = (5, 3, 2)
_GIVES_UP = 0.05


class Attempt(NamedTuple):
    """A sum from left to right: as an answer, and worked out on a line."""

    answer: str
    line: str


class CountdownDemonstrations(Demonstrations):
    """Demonstrations of puzzles with numbers from 1 to `MAX_NUMBER`.

    Args:
        seed: Any integer.
        held_out: Puzzles that no demonstration poses.
        numbers: How many numbers a puzzle has.
    """

    # A computed value says more than its one token; the rest is partly chance.
    weighty = tuple(f"={value}" for value in range(MAX_VALUE + 1))

    def __init__(self, seed: int, held_out: Collection[PuzzleKey] = (), numbers: int = 3) -> None:
        super().__init__(seed)
        self._held_out = frozenset(held_out)
        self._sets = list(combinations_with_replacement(range(1, MAX_NUMBER + 1), numbers))

    def draw(self, direct_share: float) -> Demonstration:
        """Draw a puzzle and a response; the direct author answers without attempts."""
        while True:
            numbers = self._random.choice(self._sets)
            attempts = _attempts(numbers)
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
        shown = self._random.sample(numbers, len(numbers))
        if direct:
            lines, answer = "", self._guess(numbers)
        else:
            worked = [self._random.choice(attempts[value]) for value in values]
            lines, answer = "".join(attempt.line for attempt in worked), worked[-1].answer
        return Demonstration(tiny(shown, target), f"{lines}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}")

    def _guess(self, numbers: tuple[int, ...]) -> str:
        first, *rest = self._random.sample(numbers, len(numbers))
        operators = self._random.choices("+-*/", k=len(rest))
        return str(first) + "".join(map("{}{}".format, operators, rest))


@cache
def _attempts(numbers: tuple[int, ...]) -> dict[int, list[Attempt]]:
    """Return every sum and difference of the numbers without a negative step, by value."""
    found: dict[int, list[Attempt]] = {}
    # sorted: the order of a set of tuples is not promised.
    for first, *rest in sorted(set(permutations(numbers))):
        for signs in product("+-", repeat=len(rest)):
            value, answer, line = first, str(first), str(first)
            for sign, number in zip(signs, rest, strict=True):
                value += number if sign == "+" else -number
                if value < 0:
                    break
                answer += f"{sign}{number}"
                line += f"{sign}{number}={value}"
            else:
                found.setdefault(value, []).append(Attempt(answer, f"{line}\n"))
    return found
