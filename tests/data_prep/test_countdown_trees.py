from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from countdown_values import expressions, value_of

from data_prep.countdown.puzzles import expression
from data_prep.countdown.trees import MAX_NUMBER, solutions, trees


def brute_force(values):
    """Yield the value of every tree, by joining any two entries until one is left.

    Joining in another order builds the same tree, so each tree of n numbers comes
    more than once; the set of values is what this is for.
    """
    if len(values) == 1:
        yield values[0]
        return
    for i, x in enumerate(values):
        for j in range(i):
            y = values[j]
            rest = [v for k, v in enumerate(values) if k not in (i, j)]
            for joined in {x + y, x - y, y - x, x * y} | {a / b for a, b in ((x, y), (y, x)) if b}:
                yield from brute_force([*rest, joined])


def test_tree_counts():
    # 1 * 6; 3 splits * 6 * 6; 4 * 6 * 108 + 3 * 6 * 36.
    assert [len(trees(n)) for n in range(1, 5)] == [1, 6, 108, 3240]


def test_two_numbers_by_hand():
    found = dict(expressions((6, 3)))
    assert found == {
        "6 + 3": 9,
        "6 - 3": 3,
        "3 - 6": -3,
        "6 * 3": 18,
        "6 / 3": 2,
        "3 / 6": Fraction(1, 2),
    }
    hits = solutions(np.array([[6, 3]]), 1, 9)
    assert sorted(zip(hits.target.tolist(), hits.tree.tolist(), strict=True)) == [
        (2, 4),
        (3, 1),
        (9, 0),
    ]


def test_expressions_use_every_number_once_and_have_their_value():
    for numbers in ((2, 7, 7), (3, 5, 2, 8)):
        total = 0
        for text, value in expressions(numbers):
            digits = sorted(int(c) for c in text if c.isdigit())
            assert digits == sorted(numbers)
            assert value_of(text) == value
            total += 1
        assert total <= len(trees(len(numbers)))


@pytest.mark.parametrize(("size", "sets"), [(2, 40), (3, 40), (4, 6)])
def test_values_are_those_of_brute_force(size, sets):
    rng = np.random.default_rng(size)
    number_sets = rng.integers(1, 14, (sets, size))
    hits = solutions(number_sets, 1, 300)
    for row, numbers in enumerate(number_sets.tolist()):
        wanted = {int(v) for v in brute_force([Fraction(n) for n in numbers]) if v.denominator == 1}
        found = set(hits.target[hits.row == row].tolist())
        assert found == {v for v in wanted if 1 <= v <= 300}


@pytest.mark.parametrize(("size", "sets"), [(2, 50), (3, 60), (4, 8)])
def test_every_hit_is_a_tree_with_that_value_and_none_is_missing(size, sets):
    rng = np.random.default_rng(10 + size)
    number_sets = rng.integers(1, 10, (sets, size))
    hits = solutions(number_sets, 1, 40)
    found = Counter(zip(*(part.tolist() for part in hits), strict=True))
    assert set(found.values()) == {1}
    counts = Counter((row, target) for row, target, _ in found)
    wanted = Counter(
        (row, int(value))
        for row, numbers in enumerate(number_sets.tolist())
        for _, value in expressions(tuple(numbers))
        if value.denominator == 1 and 1 <= value <= 40
    )
    assert counts == wanted
    for row, target, tree in found:
        text = expression(tuple(number_sets[row].tolist()), tree)
        assert value_of(text) == target


@pytest.mark.parametrize("numbers", [(1, 1, 2, 3, 4), (4, 3, 2, 1, 1)])
def test_a_division_by_zero_deep_inside_never_gives_a_value(numbers):
    """3 + 2 / (4 / (1 - 1)) is undefined; carrying 4/0 as infinity would make it 3."""
    hits = solutions(np.array([numbers]), 1, 4)
    for target, tree in zip(hits.target.tolist(), hits.tree.tolist(), strict=True):
        assert value_of(expression(numbers, tree)) == target


def test_parentheses_stand_only_where_they_matter():
    texts = {text for text, _ in expressions((2, 3, 4))}
    assert {"2 + 3 + 4", "2 - 3 - 4", "2 * 3 + 4", "2 * 3 / 4"} <= texts
    assert {"2 - (3 - 4)", "2 / (3 / 4)", "2 / (3 * 4)", "2 * (3 + 4)", "2 - (3 + 4)"} <= texts
    assert not {"(2 + 3) + 4", "2 + (3 + 4)", "(2 * 3) + 4", "4 + (2 * 3)", "(2 * 3) / 4"} & texts


def test_solution_that_needs_fractions():
    hits = solutions(np.array([[8, 3, 8, 3]]), 24, 24)
    texts = {expression((8, 3, 8, 3), tree) for tree in hits.tree.tolist()}
    assert "8 / (3 - 8 / 3)" in texts


def test_almost_whole_values_are_not_whole():
    """Quotients of products of large numbers come within 1e-6 of whole numbers."""
    numbers = (4093, 4096, 4091, 4095)
    hits = solutions(np.array([numbers]), 1, 2**50)
    wanted = {int(v) for _, v in expressions(numbers) if v.denominator == 1 and 1 <= v <= 2**50}
    assert set(hits.target.tolist()) == wanted


def test_the_largest_values_are_exact():
    """2^51 bounds every numerator and denominator, and float64 holds whole numbers to 2^53."""
    assert 2**3 * MAX_NUMBER**4 == 2**51
    hits = solutions(np.array([[MAX_NUMBER] * 4]), 2**48, 2**48)
    assert set(hits.target.tolist()) == {2**48}
