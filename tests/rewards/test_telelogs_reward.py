"""TeleLogs reward: accepted and refused answers, hostile text."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_verl.errors import DataError
from hpo_verl.rewards.result import MAX_RESPONSE_CHARACTERS
from hpo_verl.rewards.telelogs import CAUSES, compute_score


def extract_cause(response: str) -> str | None:
    """The cause for which a response scores 1."""
    return next((cause for cause in CAUSES if score(response, cause)), None)


def score(response: str, ground_truth: str = "C3") -> float:
    return compute_score("telelogs", response, ground_truth)["score"]


@pytest.mark.parametrize(
    ("response", "form"),
    [
        (r"\boxed{C3}", 1.0),
        (r"\boxed{{C3}}", 1.0),
        (r"\boxed{ C3 }", 0.0),
        (r"\boxed{c3}", 0.0),
        (r"\boxed{3}", 0.0),
        (r"\boxed{{3}}", 0.0),
        (r"\boxed{\text{C3}}", 0.0),
        (r"\boxed{{\text{C3}}}", 0.0),
        (r"\boxed{\text{{3}}}", 0.0),
        ("so:\n\\boxed{\n C3\t}\n", 0.0),
        (r"not \boxed{C1} but \boxed{C3}, done.", 1.0),
        (r"\boxed{C1 \boxed{C3}", 1.0),
        (r"\boxed{\boxed{C3}}", 1.0),
        (r"$$\boxed{C3}$$ and }}}} {{{", 1.0),
    ],
)
def test_accepted_answers(response: str, form: float) -> None:
    assert compute_score("telelogs", response, "C3") == {
        "score": 1.0,
        "acc": 1.0,
        "format": form,
        "reason": "correct",
    }
    assert extract_cause(response) == "C3"
    wrong = compute_score("telelogs", response, "C4")
    assert wrong == {"score": 0.0, "acc": 0.0, "format": form, "reason": "wrong_cause"}


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "no_box"),
        ("C3", "no_box"),
        ("the answer is C3.", "no_box"),
        (r"boxed{C3}", "no_box"),
        (r"\boxed C3", "no_box"),
        (r"\boxed(C3)", "no_box"),
        (r"\Boxed{C3}", "no_box"),
        (r"\boxed{C3", "unclosed_box"),
        (r"\boxed{{C3}", "unclosed_box"),
        (r"\boxed{C3} or rather \boxed{C", "unclosed_box"),
        (r"\boxed{", "unclosed_box"),
        (r"\boxed{}", "not_a_cause"),
        (r"\boxed{{}}", "not_a_cause"),  # the prompt's own example
        (r"\boxed{C3} \boxed{}", "not_a_cause"),
        (r"\boxed{{{C3}}}", "not_a_cause"),
        (r"\boxed{\text{\text{C3}}}", "not_a_cause"),
        (r"\boxed{\textbf{C3}}", "not_a_cause"),
        (r"\boxed{\{C3\}}", "not_a_cause"),
        (r"\boxed{C0}", "not_a_cause"),
        (r"\boxed{C9}", "not_a_cause"),
        (r"\boxed{C33}", "not_a_cause"),
        (r"\boxed{13}", "not_a_cause"),
        (r"\boxed{3.0}", "not_a_cause"),
        (r"\boxed{-3}", "not_a_cause"),
        (r"\boxed{C 3}", "not_a_cause"),
        (r"\boxed{C3, C4}", "not_a_cause"),
        (r"\boxed{C1C2C3C4C5C6C7C8}", "not_a_cause"),
        (r"\boxed{C3: a neighbouring cell}", "not_a_cause"),
        (r"\boxed{C３}", "not_a_cause"),  # full-width digit
        (r"\boxed{С3}", "not_a_cause"),  # Cyrillic letter
        (r"\boxed{C٣}", "not_a_cause"),  # Arabic-Indic digit
        (r"\boxed{C³}", "not_a_cause"),
        ("\\boxed{C3\x00}", "not_a_cause"),
        ("\\boxed{\u202eC3}", "not_a_cause"),
        ("\\boxed{\ud800}", "not_a_cause"),
        (r"\boxed{C3" + " " * 80 + "}", "not_a_cause"),
        (r"\boxed{C3}" + " " * MAX_RESPONSE_CHARACTERS, "too_long"),
    ],
)
def test_everything_else_scores_0(response: str, reason: str) -> None:
    assert compute_score("telelogs", response, "C3") == {
        "score": 0.0,
        "acc": 0.0,
        "format": 0.0,
        "reason": reason,
    }
    assert extract_cause(response) is None


@pytest.mark.parametrize(
    "ground_truth",
    [
        *("", "C0", "C9", "c3", "3", 3, None, ["C3"], {"a": 1}),
        *(np.array(["C3"]), np.array(["C3", "C4"]), 10**5_000),
    ],
    ids=lambda truth: type(truth).__name__,
)
def test_a_malformed_ground_truth_is_an_error(ground_truth: object) -> None:
    with pytest.raises(DataError, match=r"ground_truth .* C1 to C8"):
        compute_score("telelogs", r"\boxed{C3}", ground_truth)  # type: ignore[arg-type]


@pytest.mark.parametrize("response", [None, 3, b"\\boxed{C3}", ["\\boxed{C3}"]])
def test_a_response_that_is_not_text_is_an_error(response: object) -> None:
    with pytest.raises(DataError, match="text is needed"):
        compute_score("telelogs", response, "C3")  # type: ignore[arg-type]


def test_verl_calls_it_by_keyword_with_more_arguments() -> None:
    result = compute_score(
        data_source="telelogs_synthetic",
        solution_str=r"\boxed{C8}",
        ground_truth="C8",
        extra_info={"index": 0},
        reward_router_address=None,
    )
    assert result["score"] == 1.0


# --- an independent reading: a regular expression anchored at the last box -------------------

_CORE = r"[Cc]?([1-8])"
_FORMS = [
    rf"\s*{_CORE}\s*",
    rf"\s*\{{\s*{_CORE}\s*\}}\s*",
    rf"\s*\\text\{{\s*{_CORE}\s*\}}\s*",
    rf"\s*\{{\s*\\text\{{\s*{_CORE}\s*\}}\s*\}}\s*",
    rf"\s*\\text\{{\s*\{{\s*{_CORE}\s*\}}\s*\}}\s*",
]
_ORACLE = [re.compile(form + r"\}") for form in _FORMS]


def oracle(response: str) -> str | None:
    pieces = response.split("\\boxed{")
    if len(pieces) == 1 or len(response) > MAX_RESPONSE_CHARACTERS:
        return None
    # The content has at most 63 characters, its closing brace is the 64th at most.
    match = next((m for form in _ORACLE if (m := form.match(pieces[-1][:64]))), None)
    return None if match is None else f"C{match[1]}"


PIECES = [
    "\\boxed{", "\\boxed", "\\text{", "{", "}", "}}", "{{", "C", "c", "3", "C3", "c3", "C4", "8",
    " ", "\n", "\\", "$", "３", "\x00", "\ud800", "\u202e", "Ｃ", "the cause is ", "<answer>", "|",
    "\\boxed{C3}", "\\boxed{{C3}}", "\\boxed{\\text{C3}}", "\\boxed{3}", " " * 60,
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=14))
def test_agrees_with_an_independent_reading(pieces: list[str]) -> None:
    response = "".join(pieces)
    assert extract_cause(response) == oracle(response)
    for cause in ("C3", "C4"):
        assert score(response, cause) == float(oracle(response) == cause)


def test_mutated_responses_never_raise_hang_or_cheat() -> None:
    count = 20_000
    rng = random.Random(20250507)
    seeds = [
        r"Speed is 20 km/h.\n\boxed{C3}",
        r"\boxed{{C3}}",
        r"<think>\boxed{C1}</think>\boxed{3}",
    ]
    ones = 0
    for _ in range(count):
        text = rng.choice(seeds)
        for _ in range(rng.randint(1, 6)):
            at = rng.randint(0, len(text))
            cut = min(len(text), at + rng.choice((0, 0, 1, 2, 5)))
            text = text[:at] + rng.choice(PIECES) * rng.choice((1, 1, 1, 2)) + text[cut:]
        result = compute_score("telelogs", text, "C3")
        expected = oracle(text) == "C3"
        assert result["score"] == float(expected), repr(text)
        ones += expected
    assert 0.02 < ones / count < 0.9, "the mutations must reach both outcomes"
