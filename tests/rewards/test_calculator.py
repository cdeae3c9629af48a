import random
from fractions import Fraction
from operator import add, mul, sub, truediv

import pytest

from hpo_verl.rewards.calculator import (
    DIVISION_BY_ZERO,
    NOT_AN_EXPRESSION,
    TOO_LARGE,
    calculate,
)
from hpo_verl.rewards.expression import MAX_CHARACTERS


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3+7-2", "8"),
        (" ( 3 + 7 ) / 4 ", "5/2"),
        ("1/3-1/2", "-1/6"),
        ("1/(2-3)", "-1"),
        ("4/(1-3)", "-2"),
        ("3/(1-3)", "-3/2"),
        ("6÷4×2−1", "2"),
        ("-5", "-5"),
        ("0/5", "0"),
        ("999999999*999999999", str(999999999**2)),
    ],
)
def test_values_by_hand(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("1/0", DIVISION_BY_ZERO),
        ("2*(3-3)/(1-1)", DIVISION_BY_ZERO),
        ("999999999*999999999*10", TOO_LARGE),
        ("1/(999999999*999999999*10)", TOO_LARGE),
        *((wrong, NOT_AN_EXPRESSION) for wrong in (
            "", "2**5", "7//2", "1.5*2", "9**9**9", "__import__('os')", "1e9", "x", "3+", "= 3",
            "1+1=2", "1234567890", "٣+٤", "\ud800", "\x00", "(" * 33 + "1" + ")" * 33,
            "1+" * (MAX_CHARACTERS // 2) + "1", None, 5, True, 2.5, ["1"], {"a": 1}, b"1",
        )),
    ],
)  # fmt: skip
def test_everything_else_is_answered_by_a_text(expression, answer):
    assert calculate(expression) == answer


def test_an_answer_is_short_whatever_the_expression():
    texts = ["9" * 10**6, "×" * 10**6, "(" * 10**6, "1/" * 10**5, "*".join(["999999999"] * 25)]
    texts += ["1/" + "/".join(str(n) for n in range(100000007, 100000007 + 23))]
    for text in texts:
        assert len(calculate(text)) < 120


def test_random_expressions_are_those_of_fractions():
    draw = random.Random(0)
    operations = {"+": add, "-": sub, "*": mul, "/": truediv}
    for _ in range(300):
        a, b, c, d = (Fraction(draw.randrange(1, 30)) for _ in range(4))
        first, middle, last = draw.choices("+-*/", k=3)
        left, right = operations[first](a, b), operations[last](c, d)
        by_zero = middle == "/" and right == 0
        value = DIVISION_BY_ZERO if by_zero else str(operations[middle](left, right))
        assert calculate(f"({a}{first}{b}){middle}({c}{last}{d})") == value
