"""Demonstrations for the warm start of a policy, drawn as text and batched as tokens.

Each task has two authors. One knows the answer; the other answers with a guess, right by chance
only. Most demonstrations are the second one's, so the policy that imitates both is seldom
right, yet can do better; to find that out is left to reinforcement learning.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import combinations_with_replacement, permutations, product
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from data_prep.countdown.puzzles import PuzzleKey, short_messages, tiny_messages
from data_prep.policies.tokenizer import ANSWER_CLOSE, ANSWER_OPEN, MAX_NUMBER, MAX_VALUE
from data_prep.telelogs.prompt import tiny_prompt
from data_prep.telelogs.simulator import simulate
from hpo_verl.rewards.calculator import calculate
from hpo_verl.rewards.telelogs import CAUSES

IGNORED = -100
# Batches that are drawn together and sorted by length, to waste little on padding.
_SORTED_TOGETHER = 4
# How often the working author of Countdown needs one, two or three attempts, and gives up then.
_ATTEMPT_WEIGHTS = (5, 3, 2)
_GIVES_UP = 0.05
# How often the careless author of long responses tries.
_PRODUCTS = (2, 3)
# Of a TeleLogs drive's seed; 0 and 1 are the training and the validation split.
_STREAM = 2
# Drives that are simulated; a demonstration shows one of them, with any copied part.
_DRIVES = 4096
_COPIED = (0, 3, 6, 9)


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


class CountdownDemonstrations(Demonstrations):
    """Demonstrations of puzzles with numbers from 1 to `MAX_NUMBER`, such as `3 7 2 = 8`.

    One author works them out in up to three attempts of different value, adding and subtracting
    from left to right, and answers with the last:

        3+7=10-2=8
        <answer>3+7-2</answer>

    The other answers with the numbers in any order and any of the four operators. No solver is
    asked: attempts are drawn blindly, and the target is then set to the value of the last one
    (hindsight), except where the author gives up after three.

    Args:
        seed: Any integer.
        held_out: Puzzles that no demonstration poses.
        numbers: How many numbers a puzzle has.
    """

    # A computed value says more than its one token; the rest is partly chance.
    weighty = tuple(f"={value}" for value in range(MAX_VALUE + 1))
    pose = staticmethod(tiny_messages)

    def __init__(self, seed: int, held_out: Collection[PuzzleKey] = (), numbers: int = 3) -> None:
        super().__init__(seed)
        self._held_out = frozenset(held_out)
        self._sets = list(combinations_with_replacement(range(1, MAX_NUMBER + 1), numbers))

    def draw(self, direct_share: float) -> Demonstration:
        """Draw a puzzle and a response; the direct author answers without attempts."""
        while True:
            numbers = self._random.choice(self._sets)
            attempts = _attempts(numbers)
            tried = min(len(_ATTEMPT_WEIGHTS), len(attempts))
            values = self._random.sample(list(attempts), tried)
            untried = [value for value in attempts if value not in values]
            direct = self._random.random() < direct_share
            if direct:
                target = self._random.choice(list(attempts))
            elif untried and self._random.random() < _GIVES_UP:
                target = self._random.choice(untried)
            else:
                (count,) = self._random.choices(range(1, tried + 1), _ATTEMPT_WEIGHTS[:tried])
                values = values[:count]
                target = values[-1]
            if target > 0 and (numbers, target) not in self._held_out:
                break
        shown = self._random.sample(numbers, len(numbers))
        if direct:
            worked = []
            lines, answer = self._careless(numbers)
        else:
            worked = [self._random.choice(attempts[value]) for value in values]
            lines, answer = [line for _, line in worked], worked[-1][0]
        answer = f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"
        tried = [expression for expression, _ in worked]
        return self._shown(self.pose(shown, target), lines, tried, answer)

    def _shown(
        self, messages: list[dict[str, str]], lines: list[str], tried: list[str], answer: str
    ) -> Demonstration:
        """Put a demonstration together: of lines, or of the expressions in them."""
        return Demonstration(messages, "\n".join([*lines, answer]))

    def _careless(self, numbers: tuple[int, ...]) -> tuple[list[str], str]:
        """Return the lines and the answer of an author who does not look at the target."""
        return [], self._guess(numbers)

    def _guess(self, numbers: tuple[int, ...]) -> str:
        first, *rest = self._random.sample(numbers, len(numbers))
        operators = self._random.choices("+-*/", k=len(rest))
        return str(first) + "".join(map("{}{}".format, operators, rest))


class ToolCountdownDemonstrations(CountdownDemonstrations):
    """One turn of a conversation with a calculator, in which a turn that ends with `=` is a call.

    The author who knows asks for the value of a whole expression, and answers with it if that is
    the target; otherwise asks for another, three at most. `3 7 2 = 8`:

        3+7+2=                     the calculator says 12
        3+7-2=                     the calculator says 8
        <answer>3+7-2</answer>

    Earlier calls and replies are in the messages: all of them, as in a conversation, or the last
    alone, as where every round has a prompt of its own.
    """

    weighty = (ANSWER_OPEN,)

    def _shown(
        self, messages: list[dict[str, str]], lines: list[str], tried: list[str], answer: str
    ) -> Demonstration:
        turns = [*(f"{expression}=" for expression in tried), answer]
        turn = self._random.randrange(len(turns))
        first = self._random.choice((0, max(0, turn - 1)))
        for call in turns[first:turn]:
            reply = {"role": "tool", "content": calculate(call[:-1])}
            messages = [*messages, {"role": "assistant", "content": call}, reply]
        return Demonstration(messages, turns[turn])


class LongCountdownDemonstrations(CountdownDemonstrations):
    """Demonstrations of puzzles of three numbers in plain tokens, for any language model.

    The author who knows works as above. The other multiplies first, whatever the target, two or
    three times, and answers with the last line, which is seldom right. So wrong responses are
    the longer ones:

        12*7=84-2=82
        2*12=24+7=31
        <answer>2*12+7</answer>
    """

    weighty = ()
    pose = staticmethod(short_messages)

    def __init__(self, seed: int, held_out: Collection[PuzzleKey] = ()) -> None:
        super().__init__(seed, held_out)

    def _careless(self, numbers: tuple[int, ...]) -> tuple[list[str], str]:
        lines, answer = [], ""
        for _ in range(self._random.choice(_PRODUCTS)):
            x, y, z = self._random.sample(numbers, 3)
            sign, value = self._random.choice(
                [("+", x * y + z), ("-", x * y - z), ("*", x * y * z)]
            )
            answer = f"{x}*{y}{sign}{z}"
            lines.append(f"{x}*{y}={x * y}{sign}{z}={value}")
        return lines, answer


@cache
def _attempts(numbers: tuple[int, ...]) -> dict[int, list[tuple[str, str]]]:
    """Sums and differences without a negative step, by value: as an answer, and worked out."""
    found: dict[int, list[tuple[str, str]]] = {}
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
                found.setdefault(value, []).append((answer, line))
    return found


class TeleLogsDemonstrations(Demonstrations):
    r"""Demonstrations of the compressed TeleLogs task; the seed is not negative.

    Two authors read nine letters, copy none, three, six or all of them, and name one of eight
    causes:

        AEHKMP
        \boxed{C3}

    Nothing but the last digit tells the one who knows from the one who guesses. The drives are
    the simulator's, from a random stream of their own: none is in the training or the validation
    split. The letters are few, though, so that the same nine appear in all of them.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._drives = [
            (tiny_prompt(simulate((seed, _STREAM, index), cause)), cause)
            for index in range(_DRIVES // len(CAUSES))
            for cause in CAUSES
        ]

    def draw(self, direct_share: float) -> Demonstration:
        """Draw a drive and a response; the direct author guesses the cause."""
        letters, cause = self._random.choice(self._drives)
        if self._random.random() < direct_share:
            cause = self._random.choice(CAUSES)
        copied = self._random.choice(_COPIED)
        line = f"{letters[:copied]}\n" if copied else ""
        return Demonstration([{"role": "user", "content": letters}], f"{line}\\boxed{{{cause}}}")


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
