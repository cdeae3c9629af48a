"""A calculator for tools: exact arithmetic that a model asks for, as text.

What it is given is hostile: bounded first, never evaluated as code, and nothing in it raises. The
answer holds nothing of it but numbers.
"""

from __future__ import annotations

from math import gcd

from hpo_verl.rewards.expression import MAX_CHARACTERS, normalise, read_expression

MAX_RESULT_DIGITS = 18
"""Of numerator and denominator each."""

NOT_AN_EXPRESSION = (
    f"error: not an expression of integers, + - * / and parentheses, of at most {MAX_CHARACTERS} "
    "characters"
)
DIVISION_BY_ZERO = "error: division by zero"
TOO_LARGE = f"error: more than {MAX_RESULT_DIGITS} digits"


def calculate(expression: object) -> str:
    """Return the value of an expression: an integer, a reduced fraction, or what is wrong.

    The grammar is that of the answers to Countdown (`expression`): `(3 + 7) / 4` gives `5/2`.
    """
    if not isinstance(expression, str) or len(expression) > MAX_CHARACTERS:
        return NOT_AN_EXPRESSION
    found = read_expression(normalise(expression))
    if found is None:
        return NOT_AN_EXPRESSION
    if found.denominator == 0:
        return DIVISION_BY_ZERO
    common = gcd(found.numerator, found.denominator)
    if found.denominator < 0:
        common = -common
    numerator, denominator = found.numerator // common, found.denominator // common
    if max(abs(numerator), denominator) >= 10**MAX_RESULT_DIGITS:
        return TOO_LARGE
    return str(numerator) if denominator == 1 else f"{numerator}/{denominator}"
