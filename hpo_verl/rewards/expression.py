"""Read arithmetic that a model wrote: bounded, exact, and without evaluating any code.

Grammar, blanks anywhere between tokens:

    expression = ["-"] term {("+" | "-") term}
    term       = factor {("*" | "/") factor}
    factor     = integer | "(" expression ")"
    integer    = "0" | digit 1-9 {digit}, at most `MAX_DIGITS` ASCII digits

The operators, parentheses and "=" may be written in their Unicode forms. One pass
with two stacks (operator precedence), so no recursion; the text is at most
`MAX_CHARACTERS` long and nests at most `MAX_DEPTH` deep. Values are exact
rationals, two Python integers.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_CHARACTERS = 256
MAX_DEPTH = 32
MAX_DIGITS = 9

_UNICODE_FORMS = str.maketrans(
    {
        "×": "*", "∗": "*", "⋅": "*", "·": "*", "＊": "*",
        "÷": "/", "∕": "/", "⁄": "/", "／": "/",
        "−": "-", "－": "-", "＋": "+", "＝": "=",
        "（": "(", "）": ")",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u3000": " ",
    }
)  # fmt: skip
_BLANKS = " \t\r\n"
_DIGITS = "0123456789"
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}


class Expression(NamedTuple):
    """The integers of an expression in their order, and its value as a fraction.

    The fraction is not reduced. A division by zero anywhere makes it 0/0.
    """

    integers: list[int]
    numerator: int
    denominator: int

    def equals(self, value: int) -> bool:
        """Say whether the value is defined and equal to an integer."""
        return self.denominator != 0 and self.numerator == value * self.denominator


def normalise(text: str) -> str:
    """Replace the Unicode forms of operators, parentheses and blanks by ASCII."""
    return text if text.isascii() else text.translate(_UNICODE_FORMS)


def read_integer(text: str) -> int | None:
    """Return the value of an integer of the grammar, perhaps with a minus sign, or None."""
    text = text.strip(_BLANKS)
    negative = text.startswith("-")
    digits = text[1:].lstrip(_BLANKS) if negative else text
    if not _is_integer(digits):
        return None
    return -int(digits) if negative else int(digits)


def read_expression(text: str) -> Expression | None:
    """Read normalised text by the grammar above; None if it is not of that form."""
    if len(text) > MAX_CHARACTERS:
        return None
    integers: list[int] = []
    values: list[tuple[int, int]] = []
    operators: list[str] = []
    depth = 0
    operand_next = sign_allowed = True
    position = 0
    while position < len(text):
        character = text[position]
        position += 1
        if character in _BLANKS:
            continue
        if operand_next:
            if character in _DIGITS:
                start = position - 1
                while position < len(text) and text[position] in _DIGITS:
                    position += 1
                if not _is_integer(text[start:position]):
                    return None
                integers.append(int(text[start:position]))
                values.append((integers[-1], 1))
                operand_next = sign_allowed = False
            elif character == "(" and depth < MAX_DEPTH:
                operators.append(character)
                depth += 1
                sign_allowed = True
            elif character == "-" and sign_allowed:
                # A leading minus is 0 - term: the same value at the same precedence.
                values.append((0, 1))
                operators.append(character)
                sign_allowed = False
            else:
                return None
        elif character == ")" and depth:
            while operators[-1] != "(":
                _apply(operators.pop(), values)
            operators.pop()
            depth -= 1
        elif character in "+-*/":
            rank = _PRECEDENCE[character]
            while operators and _PRECEDENCE[operators[-1]] >= rank:
                _apply(operators.pop(), values)
            operators.append(character)
            operand_next = True
        else:
            return None
    if operand_next or depth:
        return None
    while operators:
        _apply(operators.pop(), values)
    return Expression(integers, *values[0])


def _is_integer(digits: str) -> bool:
    return (
        0 < len(digits) <= MAX_DIGITS
        and digits.isascii()
        and digits.isdigit()
        and (digits[0] != "0" or digits == "0")
    )


def _apply(operator: str, values: list[tuple[int, int]]) -> None:
    """Replace the last two values by their combination; 0/0 stays 0/0 ever after."""
    p2, q2 = values.pop()
    p1, q1 = values[-1]
    if operator == "+":
        values[-1] = (p1 * q2 + p2 * q1, q1 * q2)
    elif operator == "-":
        values[-1] = (p1 * q2 - p2 * q1, q1 * q2)
    elif operator == "*":
        values[-1] = (p1 * p2, q1 * q2)
    else:
        values[-1] = (p1 * q2, q1 * p2) if p2 else (0, 0)
