"""Countdown puzzles: sample solvable ones, name them, and put them to a policy.

A puzzle is a multiset of numbers and a target. Sampling is uniform over the solvable puzzles of
the ranges, without replacement: number sets come in a random order, all their reachable targets
are found exactly, and each is kept with one probability that is the same for every set.
"""

from __future__ import annotations

import ast
import hashlib
import json
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.command import first_line
from data_prep.countdown.trees import MAX_NUMBER, SIZES, Array, Solutions, solutions, trees
from hpo_verl.errors import ConfigError, DataError

# A puzzle up to order: sorted numbers and target.
PuzzleKey = tuple[tuple[int, ...], int]
Messages = list[dict[str, str]]

OPERATORS = "+-*/"
_OPERATIONS: dict[type[ast.operator], tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}
# How many sets to solve between two reports of progress, by count of numbers.
SETS_AT_ONCE = {3: 4096, 4: 2048}
# Most number sets, whose order is one permutation in memory.
_MOST_SETS = 20_000_000
# No prompt holds an expression in the reward's grammar, which could be copied as an answer.
_SYSTEM = (
    "You solve arithmetic puzzles. Reason step by step, check your result, "
    "and then give the answer in the form asked for."
)
_TASK = (
    "Combine the numbers {numbers} into an expression whose value is exactly {target}. "
    "Use each number exactly once, no other number, and only +, -, *, / and parentheses. "
)


class Puzzle(NamedTuple):
    """A solvable puzzle."""

    numbers: tuple[int, ...]
    target: int
    difficulty: int  # number of solutions: expression trees, as `trees.py` counts them
    solution: str  # one of them, drawn uniformly


@dataclass(frozen=True)
class Ranges:
    """Which puzzles exist: how many numbers, the inclusive ranges, and the operators.

    A puzzle belongs to them if an expression with no other operator solves it;
    a policy may use all four all the same. A bad value raises ConfigError.
    """

    numbers: int
    min_number: int = 1
    max_number: int = 99
    min_target: int = 10
    max_target: int = 100
    operators: str = OPERATORS

    def __post_init__(self) -> None:
        if self.numbers not in SIZES:
            raise ConfigError(f"numbers is {self.numbers}; permitted: 3 or 4")
        for what in ("number", "target"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if not 1 <= low <= high:
                raise ConfigError(
                    f"min_{what} is {low} and max_{what} is {high}; "
                    f"permitted: 1 <= min_{what} <= max_{what}"
                )
        if self.max_number > MAX_NUMBER or self.number_sets > _MOST_SETS:
            raise ConfigError(
                f"{self.numbers} numbers from {self.min_number} to {self.max_number} make too many "
                f"sets; permitted: numbers up to {MAX_NUMBER} and {_MOST_SETS:,} sets"
            )
        if not self.operators or not set(self.operators) <= set(OPERATORS):
            raise ConfigError(f"operators is {self.operators!r}; permitted: one or more of + - * /")

    @property
    def number_sets(self) -> int:
        """How many multisets of numbers there are."""
        return comb(self.max_number - self.min_number + self.numbers, self.numbers)


def sample_puzzles(
    count: int,
    ranges: Ranges,
    seed: int,
    progress: Callable[[int], None] = lambda found: None,
) -> list[Puzzle]:
    """Sample `count` different solvable puzzles, in random order.

    No two agree in target and in numbers up to their order; the order in which a puzzle lists its
    numbers is random. The same arguments give the same puzzles. `progress` is told the number of
    puzzles found so far.

    Raises:
        DataError: The ranges hold fewer solvable puzzles; the message says how many.
    """
    rate = _keep_probability(count, ranges, seed)
    found = _sample(count, ranges, seed, rate, progress)
    if len(found) < count and rate < 1:
        found = _sample(count, ranges, seed, 1.0, progress)
    if len(found) < count:
        raise DataError(
            f"{count} puzzles wanted, but only {len(found)} solvable ones of {ranges.numbers} "
            f"numbers from {ranges.min_number} to {ranges.max_number} with targets from "
            f"{ranges.min_target} to {ranges.max_target} and the operators {ranges.operators} "
            "exist; ask for fewer or widen the ranges"
        )
    order = np.random.default_rng((seed, 2)).permutation(len(found))[:count]
    return [found[i] for i in order]


def expression(numbers: Sequence[int], tree: int) -> str:
    """Return a tree over the numbers as text with the fewest parentheses, `(3 + 7) * 2`."""
    return trees(len(numbers))[tree].text.format(*numbers)


def worked(solution: str) -> str:
    r"""The solver's answer to imitate: every step of a solution, and the solution itself.

    `(3 + 7) * 2` gives `3+7=10\n10*2=20\n<answer>(3+7)*2</answer>`.
    """
    lines: list[str] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)  # noqa: S101 - for the type checker
        symbol, operation = _OPERATIONS[type(node.op)]
        left, right = value(node.left), value(node.right)
        result = operation(left, right)
        lines.append(f"{_operand(left)}{symbol}{_operand(right)}={result}")
        return result

    value(ast.parse(solution, mode="eval").body)
    return "\n".join([*lines, f"<answer>{solution.replace(' ', '')}</answer>"])


def _operand(value: Fraction) -> str:
    return str(value) if value.denominator == 1 and value >= 0 else f"({value})"


def puzzle_key(ground_truth: Mapping[str, Any]) -> PuzzleKey:
    """The puzzle of a row's ground truth, up to order."""
    numbers = sorted(int(number) for number in ground_truth["numbers"])
    return tuple(numbers), int(ground_truth["target"])


def puzzles_digest(puzzles: Collection[PuzzleKey]) -> str:
    """Return the sha256 of a set of puzzles, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(set(puzzles))).encode()).hexdigest()


def read_puzzles(path: str | Path) -> set[PuzzleKey]:
    """The puzzles of a Countdown file; raises DataError where it or a row of it is none."""
    try:
        rows = pq.read_table(path, columns=["reward_model"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot read: {first_line(error)}") from error
    puzzles: set[PuzzleKey] = set()
    for number, row in enumerate(rows, start=1):
        try:
            puzzles.add(puzzle_key(row["reward_model"]["ground_truth"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: row {number}: reward_model.ground_truth is not "
                "{target: integer, numbers: [integer, ...]}"
            ) from error
    return puzzles


def chat_messages(numbers: Sequence[int], target: int) -> Messages:
    """System and user message, for instruction-tuned models: the chat template wraps them once."""
    task = _TASK.format(numbers=", ".join(map(str, numbers)), target=target)
    return [
        {"role": "system", "content": _SYSTEM},
        {
            "role": "user",
            "content": task + "Close your reply with the expression between answer tags, "
            "like this: <answer>expression</answer>",
        },
    ]


def tiny_messages(numbers: Sequence[int], target: int) -> Messages:
    """One short message such as `3 7 2 = 13`, for the tiny policy that is trained on CPU.

    It explains nothing: only a policy that was warm-started on this form can read it.
    """
    return [{"role": "user", "content": f"{' '.join(map(str, numbers))} = {target}"}]


def short_messages(numbers: Sequence[int], target: int) -> Messages:
    """The same behind a system message of one word: many chat templates add a longer one."""
    return [{"role": "system", "content": "Countdown"}, *tiny_messages(numbers, target)]


PROMPTS: dict[str, Callable[[Sequence[int], int], Messages]] = {
    "chat": chat_messages,
    "short": short_messages,
    "tiny": tiny_messages,
}


def _keep_probability(count: int, ranges: Ranges, seed: int) -> float:
    """Choose the share of reachable targets to keep, from a few number sets.

    That is one puzzle of a set, to see many sets, or half as much again as is needed on
    average, so that a shortfall is rare.
    """
    probe = next(_number_sets(ranges, seed))[: SETS_AT_ONCE[ranges.numbers] // 4 + 1]
    hits = _hits(probe, ranges)
    reachable = len(np.unique(hits.row * (ranges.max_target + 1) + hits.target)) / len(probe)
    wanted = max(1.0, 1.5 * count / ranges.number_sets)
    return min(1.0, wanted / reachable) if reachable else 1.0


def _sample(
    count: int, ranges: Ranges, seed: int, rate: float, progress: Callable[[int], None]
) -> list[Puzzle]:
    rng = np.random.default_rng((seed, 1))
    found: list[Puzzle] = []
    for sets in _number_sets(ranges, seed):
        found += _keep(sets, ranges, rate, rng)
        progress(min(len(found), count))
        if len(found) >= count:
            break
    return found


def _hits(sets: Array, ranges: Ranges) -> Solutions:
    """Return what solves puzzles of the ranges with their operators."""
    hits = solutions(sets, ranges.min_target, ranges.max_target)
    others = set(OPERATORS) - set(ranges.operators)
    if not others:
        return hits
    permitted = np.array([others.isdisjoint(tree.text) for tree in trees(ranges.numbers)])
    return Solutions(*(part[permitted[hits.tree]] for part in hits))


def _keep(sets: Array, ranges: Ranges, rate: float, rng: np.random.Generator) -> list[Puzzle]:
    """Return the puzzles kept from some number sets."""
    hits = _hits(sets, ranges)
    width = ranges.max_target + 1
    key = hits.row * width + hits.target
    counts = np.bincount(key, minlength=len(sets) * width)
    kept = (counts > 0) & (rng.random(len(counts)) < rate)
    candidates = np.flatnonzero(kept[key])
    candidates = candidates[rng.permutation(len(candidates))]
    # The first of each key after shuffling: a uniform draw among its solutions.
    keys, first = np.unique(key[candidates], return_index=True)
    shown = rng.permuted(sets[keys // width], axis=1)
    return [
        Puzzle(tuple(order), target, difficulty, expression(numbers, tree))
        for order, target, difficulty, numbers, tree in zip(
            shown.tolist(),
            (keys % width).tolist(),
            counts[keys].tolist(),
            sets[keys // width].tolist(),
            hits.tree[candidates[first]].tolist(),
            strict=True,
        )
    ]


def _number_sets(ranges: Ranges, seed: int) -> Iterator[Array]:
    """Yield every multiset of numbers once, in random order, as arrays (sets, numbers)."""
    every = np.arange(ranges.number_sets, dtype=np.int32)
    order = np.random.default_rng((seed, 0)).permutation(every)
    chunk = SETS_AT_ONCE[ranges.numbers]
    for start in range(0, len(order), chunk):
        yield _unrank(order[start : start + chunk].astype(np.int64), ranges)


def _unrank(ranks: Array, ranges: Ranges) -> Array:
    """Turn ranks into multisets: the combinatorial number system, then minus 0, 1, 2, ..."""
    span = ranges.max_number - ranges.min_number + ranges.numbers
    columns = []
    for place in range(ranges.numbers, 0, -1):
        table = np.array([comb(i, place) for i in range(span + 1)], dtype=np.int64)
        chosen = np.searchsorted(table, ranks, side="right") - 1
        ranks = ranks - table[chosen]
        columns.append(chosen - (place - 1) + ranges.min_number)
    return np.stack(columns[::-1], axis=1)
