"""Exact values of every expression over three or four numbers, for many number sets at once.

An expression is a binary tree whose leaves are all the given numbers, each once, and whose nodes
are + - * /. Swapping the operands of + or * gives the same tree; equal numbers at different
positions count as different leaves. That makes 6, 108 and 3,240 trees over 2, 3 and 4 numbers.

Values are rationals p/q, kept as two arrays of whole numbers in float64, never reduced. Over n
numbers from 1 to `MAX_NUMBER`, |p| and |q| are at most 2^(n-1) * MAX_NUMBER^n = 2^51, so every sum
and product is exact, and so is the test for a whole value (p == round(p/q) * q). A division by
zero is written 0/0, which every further operation keeps at 0/0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

SIZES = (3, 4)
MAX_NUMBER = 4096
Array = np.ndarray

# The order of the trees over a pair of subtrees: each operator as far as its order matters.
_LAYOUT = "+--*//"
_MINUS, _MINUS_REVERSED = 1, 2
_REVERSED = (_MINUS_REVERSED, 5)
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_LEAF = 3
# Elements of one block of pairs that stay in a core's cache.
_BLOCK = 60_000


class Tree(NamedTuple):
    """An expression as text, with a format field for each position: `({0} + {1}) * {2}`."""

    text: str
    precedence: int

    def beside(self, precedence: int, strict: bool) -> str:
        """Return the text as an operand, in parentheses where they matter."""
        bare = self.precedence > precedence or (self.precedence == precedence and not strict)
        return self.text if bare else f"({self.text})"


class Solutions(NamedTuple):
    """Trees whose value is a whole number in a range; three arrays of one length."""

    row: Array  # index of the number set
    target: Array  # the value
    tree: Array  # index into `trees`


def trees(size: int) -> tuple[Tree, ...]:
    """Return every tree over `size` numbers."""
    return _trees((1 << size) - 1)


def solutions(number_sets: Array, low: int, high: int) -> Solutions:
    """Find every tree with a whole value in [low, high], low >= 1.

    The number sets are integers from 1 to `MAX_NUMBER`, shape (sets, 2 to 4).
    """
    found = [np.zeros((3, 0), dtype=np.int64)]
    step = _BLOCK // len(trees(number_sets.shape[1] - 1))
    for start in range(0, len(number_sets), step):
        sets = number_sets[start : start + step].astype(np.float64)
        for row, target, tree in _solve(sets, low, high):
            found.append(np.stack([row + start, target.astype(np.int64), tree]))
    return Solutions(*np.concatenate(found, axis=1))


@cache
def _splits(mask: int) -> tuple[tuple[int, int], ...]:
    """Return the unordered splits of a set of positions into two parts, as bit masks."""
    lowest = mask & -mask
    parts = [part for part in range(1, mask) if part & mask == part and part & lowest]
    return tuple((part, mask ^ part) for part in parts)


@cache
def _trees(mask: int) -> tuple[Tree, ...]:
    """Return the trees over a set of positions, in the order in which `_join` has their values."""
    if mask.bit_count() == 1:
        return (Tree(f"{{{mask.bit_length() - 1}}}", _LEAF),)
    found: list[Tree] = []
    for left, right in _splits(mask):
        for kind, symbol in enumerate(_LAYOUT):
            rank = _PRECEDENCE[symbol]
            for x in _trees(left):
                for y in _trees(right):
                    first, second = (y, x) if kind in _REVERSED else (x, y)
                    text = f"{first.beside(rank, False)} {symbol} "
                    found.append(Tree(text + second.beside(rank, symbol in "-/"), rank))
    return tuple(found)


def _join(x: tuple[Array, Array], y: tuple[Array, Array]) -> list[tuple[Array, Array]]:
    """Return p and q of x + y, x - y, y - x, x * y, x / y, y / x, each (sets, trees, trees)."""
    p1, q1 = (part[:, :, None] for part in x)
    p2, q2 = (part[:, None, :] for part in y)
    a, b, c = p1 * q2, p2 * q1, q1 * q2
    return [
        (a + b, c), (a - b, c), (b - a, c), (p1 * p2, c), (a * (b != 0), b), (b * (a != 0), a)
    ]  # fmt: skip


def _solve(sets: Array, low: int, high: int) -> Iterator[tuple[Array, Array, Array]]:
    """Yield the row, the target and the tree of the solutions of one block, part by part."""
    rows, size = sets.shape
    whole = (1 << size) - 1
    values = {1 << i: (sets[:, i : i + 1], np.ones((rows, 1))) for i in range(size)}
    for mask in sorted(range(1, whole), key=int.bit_count):
        if mask.bit_count() > 1:
            joined = [pair for a, b in _splits(mask) for pair in _join(values[a], values[b])]
            p, q = (
                np.concatenate([part.reshape(rows, -1) for part in parts], axis=1)
                for parts in zip(*joined, strict=True)
            )
            values[mask] = p, q
    offset = 0
    for left, right in _splits(whole):
        for kind, (p, q) in enumerate(_join(values[left], values[right])):
            pairs = p[0].size
            if kind != _MINUS_REVERSED:
                with np.errstate(divide="ignore", invalid="ignore"):
                    quotient = np.rint(p / q)
                target = np.abs(quotient) if kind == _MINUS else quotient
                hit = np.flatnonzero((quotient * q == p) & (target >= low) & (target <= high))
                row, pair = np.divmod(hit, pairs)
                # x - y = -t is the tree y - x = t, which follows it in the layout.
                reversed_too = np.where(quotient.ravel()[hit] < 0, pairs, 0)
                yield row, target.ravel()[hit], offset + reversed_too + pair
            offset += pairs
