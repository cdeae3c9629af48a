"""Independent judges of the two rewards: Python's own parser and regular expressions.

They share no code with `hpo_verl.rewards` and read the same published rules. Slow and
not hardened, so for short texts in tests only.
"""

from __future__ import annotations

import ast
import re
from fractions import Fraction

UNICODE_FORMS = {
    "*": "×∗⋅·＊",
    "/": "÷∕⁄／",
    "-": "−－",
    "+": "＋",
    "=": "＝",
    "(": "（",
    ")": "）",
    " ": "\u00a0\u2009\u202f\u3000",
}
_NODES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.USub, ast.Constant)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


def countdown_oracle(response: str, target: int, numbers: list[int]) -> float:
    """Score a Countdown response."""
    blocks = [
        response[opening.end() : closing]
        for opening in re.finditer("<answer>", response)
        if (closing := response.find("</answer>", opening.end())) >= 0
    ]
    if len(response) > 100_000 or not blocks or len(blocks[-1]) > 1000:
        return 0.0
    text = blocks[-1]
    for plain, forms in UNICODE_FORMS.items():
        text = re.sub(f"[{forms}]", plain, text)
    left, equals, right = text.strip().partition("=")
    if equals and not re.fullmatch(r"[ \t\r\n]*(-[ \t\r\n]*)?(0|[1-9][0-9]{0,8})[ \t\r\n]*", right):
        return 0.0
    if equals and int(re.sub(r"\s", "", right)) != target:
        return 0.0
    return float(evaluates_to(left, target, numbers))


def evaluates_to(text: str, target: int, numbers: list[int]) -> bool:
    """Say whether a text is an expression over exactly these numbers with that value."""
    if len(text) > 256 or not re.fullmatch(r"[0-9+\-*/() \t\r\n]*", text):
        return False
    literals = re.findall("[0-9]+", text)
    if any(len(literal) > 9 or (literal[0] == "0" and literal != "0") for literal in literals):
        return False
    flat = re.sub(r"[ \t\r\n]+", " ", text).strip()
    # No powers or floor division, and a sign only where an expression begins.
    if "**" in flat or "//" in flat or re.search(r"[-+*/] *-", flat):
        return False
    depth = deepest = 0
    for character in flat:
        depth += {"(": 1, ")": -1}.get(character, 0)
        deepest = max(deepest, depth)
    if deepest > 32:
        return False
    try:
        tree = ast.parse(flat, mode="eval")
    except SyntaxError:
        return False
    if not all(isinstance(node, _NODES + _OPERATORS) for node in ast.walk(tree)):
        return False
    if sorted(map(int, literals)) != sorted(numbers):
        return False
    try:
        return _value(tree.body) == target
    except ZeroDivisionError:
        return False


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand)
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left), _value(node.right)
    return {
        ast.Add: lambda: left + right,
        ast.Sub: lambda: left - right,
        ast.Mult: lambda: left * right,
        ast.Div: lambda: left / right,
    }[type(node.op)]()


_CAUSE = r"\s*[Cc]?([1-8])\s*"
_BOX = re.compile(
    "|".join(
        form.replace("CAUSE", _CAUSE) + r"\}"
        for form in (
            "CAUSE",
            r"\s*\{CAUSE\}\s*",
            r"\s*\\text\{CAUSE\}\s*",
            r"\s*\{\s*\\text\{CAUSE\}\s*\}\s*",
            r"\s*\\text\{\s*\{CAUSE\}\s*\}\s*",
        )
    )
)


def telelogs_oracle(response: str, cause: str) -> float:
    """Score a TeleLogs response."""
    start = response.rfind("\\boxed{")
    if len(response) > 100_000 or start < 0:
        return 0.0
    found = _BOX.match(response[start + len("\\boxed{") :][:64])
    return float(found is not None and f"C{next(filter(None, found.groups()))}" == cause)
