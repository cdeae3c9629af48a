"""Exact values of every expression over a few numbers, for many number sets at once.

An expression is a binary tree whose leaves are all the given numbers, each once,
and whose nodes are + - * /. Swapping the operands of + or * gives the same tree;
equal numbers at different positions count as different leaves. That makes
6, 108, 3,240, 136,080 and 7,348,320 trees over 2, 3, 4, 5 and 6 numbers.

Values are rationals p/q, kept as two arrays of whole numbers in float64, never
reduced. Over n numbers a_i >= 1, |p| and |q| are at most 2^(n-1) * prod(a_i);
`check_exact` refuses ranges where that passes 2^51, so every sum and product is
exact, and so is the test for a whole value (p == round(p/q) * q). A division by
zero is written 0/0, which every further operation keeps at 0/0.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from hpo_verl.errors import DataError

Array = np.ndarray
# A leaf is the position of its number.
Tree = int | tuple[str, "Tree", "Tree"]

# The layout of a pair of subtrees: each operator as far as its order matters.
LAYOUT = "+--*//"
OPERATORS = len(LAYOUT)
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_EXACT = 2**51
# Elements of one block of pairs that stay in a core's cache.
_BLOCK = 60_000


class Solutions(NamedTuple):
    """Trees whose value is a whole number in a range; three arrays of one length.

    `row` is the index of the number set, `target` the value, `tree` the index that
    `expression` decodes.
    """

    row: Array
    target: Array
    tree: Array


def check_exact(numbers: int, max_number: int) -> None:
    """Raise DataError if values over `numbers` numbers up to `max_number` may not be exact."""
    if 2 ** (numbers - 1) * max_number**numbers > _EXACT:
        limit = int((_EXACT / 2 ** (numbers - 1)) ** (1 / numbers))
        raise DataError(
            f"numbers up to {max_number}: with {numbers} numbers a puzzle can be solved exactly "
            f"up to {limit}; permitted range 1 to {limit}"
        )


def solutions(number_sets: Array, low: int, high: int) -> Solutions:
    """Find every tree with a whole value in [low, high], low >= 1.

    Args:
        number_sets: Integers >= 1, shape (sets, n), n from 2 to 6.
        low: Smallest target.
        high: Largest target.
    """
    number_sets = np.asarray(number_sets, dtype=np.float64)
    size = number_sets.shape[1]
    step = max(1, _BLOCK // tree_count(size - 1))
    found = [
        hit
        for start in range(0, len(number_sets), step)
        for hit in _solve_block(number_sets[start : start + step], low, high, start)
    ]
    if not found:
        return Solutions(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    return Solutions(*(np.concatenate(part) for part in zip(*found, strict=True)))


@cache
def tree_count(size: int) -> int:
    """Return the number of trees over `size` numbers."""
    if size == 1:
        return 1
    whole = (1 << size) - 1
    return sum(
        OPERATORS * tree_count(left.bit_count()) * tree_count(right.bit_count())
        for left, right in _splits(whole)
    )


@lru_cache(maxsize=8)
def permitted_trees(size: int, operators: str) -> Array:
    """Return which trees over `size` numbers use no operator but the given ones.

    Returns:
        `[tree_count(size)]` bool.
    """
    if size == 1:
        return np.ones(1, dtype=bool)
    parts = []
    for left, right in _splits((1 << size) - 1):
        both = np.logical_and.outer(
            permitted_trees(left.bit_count(), operators),
            permitted_trees(right.bit_count(), operators),
        ).ravel()
        parts += [both if symbol in operators else np.zeros_like(both) for symbol in LAYOUT]
    return np.concatenate(parts)


def expression(numbers: tuple[int, ...], tree: int) -> str:
    """Return a tree as text with the fewest parentheses, such as `(3 + 7) * 2`."""
    return _template(len(numbers), tree).format(*numbers)


def enumerate_expressions(numbers: tuple[int, ...]) -> Iterator[tuple[str, Fraction]]:
    """Yield every expression over the numbers, each used once, with its exact value.

    Trees that divide by zero are left out. Meant for up to 4 numbers (3,240 trees).
    """
    size = len(numbers)
    for index in range(tree_count(size)):
        try:
            value = _value(_decode((1 << size) - 1, index), numbers)
        except ZeroDivisionError:
            continue
        yield expression(numbers, index), value


@cache
def _splits(mask: int) -> tuple[tuple[int, int], ...]:
    """Return the unordered splits of a set of positions into two parts, as bit masks."""
    lowest = mask & -mask
    parts = [part for part in range(1, mask) if part & mask == part and part & lowest]
    return tuple((part, mask ^ part) for part in parts)


def _solve_block(sets: Array, low: int, high: int, start: int) -> Iterator[tuple[Array, ...]]:
    size = sets.shape[1]
    whole = (1 << size) - 1
    values: dict[int, tuple[Array, Array]] = {
        1 << i: (sets[:, i : i + 1], np.ones((len(sets), 1))) for i in range(size)
    }
    for mask in sorted(range(1, whole), key=int.bit_count):
        if mask.bit_count() > 1:
            values[mask] = _combine(mask, values)
    offset = 0
    for left, right in _splits(whole):
        a, b, c, d = _products(values[left], values[right])
        pairs = a.shape[1] * a.shape[2]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for operator, (p, q) in ((0, (a + b, c)), (1, (a - b, c)), (3, (d, c))):
                yield from _whole(p, q, operator, low, high, start, offset, pairs)
            yield from _whole(a, b, 4, low, high, start, offset, pairs)
            yield from _whole(b, a, 5, low, high, start, offset, pairs)
        offset += OPERATORS * pairs


def _whole(
    p: Array, q: Array, operator: int, low: int, high: int, start: int, offset: int, pairs: int
) -> Iterator[tuple[Array, ...]]:
    """Yield (row, target, tree) of the whole values of p/q in [low, high]."""
    quotient = np.rint(p / q)
    size = np.abs(quotient) if operator == 1 else quotient
    hit = np.flatnonzero((quotient * q == p) & (size >= low) & (size <= high))
    if len(hit):
        row, pair = np.divmod(hit, pairs)
        # x - y = -t is the tree y - x = t, which follows it in the layout.
        kind = np.where(quotient.ravel()[hit] < 0, 2, operator)
        yield row + start, size.ravel()[hit].astype(np.int64), offset + kind * pairs + pair


def _products(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, ...]:
    """For x = p1/q1, y = p2/q2 return p1*q2, p2*q1, q1*q2, p1*p2, each (sets, trees, trees)."""
    p1, q1 = (part[:, :, None] for part in x)
    p2, q2 = (part[:, None, :] for part in y)
    return p1 * q2, p2 * q1, q1 * q2, p1 * p2


def _combine(mask: int, values: dict[int, tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return p and q, (sets, trees), of all trees over the positions in the mask."""
    p_parts, q_parts = [], []
    for left, right in _splits(mask):
        a, b, c, d = _products(values[left], values[right])
        divisible, invertible = b != 0, a != 0
        p_parts += [a + b, a - b, b - a, d, a * divisible, b * invertible]
        q_parts += [c, c, c, c, b, a]
    rows = len(p_parts[0])
    return tuple(  # pyright: ignore[reportReturnType]
        np.concatenate([part.reshape(rows, -1) for part in parts], axis=1)
        for parts in (p_parts, q_parts)
    )


@lru_cache(maxsize=100_000)
def _template(size: int, tree: int) -> str:
    """Return the text of a tree with a format field for each position."""
    return _text(_decode((1 << size) - 1, tree))[0]


def _decode(mask: int, index: int) -> Tree:
    """Return the tree of an index over the positions in the mask."""
    if mask.bit_count() == 1:
        return mask.bit_length() - 1
    for left, right in _splits(mask):
        columns = tree_count(right.bit_count())
        pairs = tree_count(left.bit_count()) * columns
        if index < OPERATORS * pairs:
            operator, pair = divmod(index, pairs)
            x = _decode(left, pair // columns)
            y = _decode(right, pair % columns)
            symbol = LAYOUT[operator]
            return (symbol, y, x) if operator in (2, 5) else (symbol, x, y)
        index -= OPERATORS * pairs
    raise IndexError(f"no tree {index} over {mask.bit_count()} numbers")


def _text(tree: Tree) -> tuple[str, int]:
    """Return the template of a tree and the precedence of its root (3 for a leaf)."""
    if isinstance(tree, int):
        return f"{{{tree}}}", 3
    symbol, left, right = tree
    rank = _PRECEDENCE[symbol]
    left_text, left_rank = _text(left)
    right_text, right_rank = _text(right)
    if left_rank < rank:
        left_text = f"({left_text})"
    if right_rank < rank or (right_rank == rank and symbol in "-/"):
        right_text = f"({right_text})"
    return f"{left_text} {symbol} {right_text}", rank


def _value(tree: Tree, numbers: tuple[int, ...]) -> Fraction:
    if isinstance(tree, int):
        return Fraction(numbers[tree])
    symbol, left, right = tree
    x, y = _value(left, numbers), _value(right, numbers)
    return {"+": x + y, "-": x - y, "*": x * y}[symbol] if symbol != "/" else x / y
