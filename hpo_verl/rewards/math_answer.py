r"""A final answer that is a number or a formula, compared by math-verify.

Read is the last `\boxed{}` of the response; without one, the last `<answer>` block; without that,
what follows the last `####`, as in GSM8K, on its line. Only that text, of bounded length, reaches
math-verify: its regular expressions over whole responses backtrack. 1/2, 0.5 and \frac{1}{2} are
equal, as are 1,234 and 1234; `72 dollars` is no number, `72\text{ dollars}` is.

math-verify bounds its time by a signal, which works in a main thread only, does not end a
computation in C (10^{10^{10}}), and gives no error. It is switched off: the guarded reward manager
bounds time, and counts an answer that takes longer as an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hpo_verl.rewards.result import (
    RewardResult,
    bad_ground_truth,
    last_answer,
    last_box,
    require_text,
    reward_result,
)
from hpo_verl.rewards.third_party import load

_MAX_ANSWER_CHARACTERS = 200
_MARK = "####"


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | int | float,
    extra_info: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> RewardResult:
    r"""Score one response to a question with a number or a formula as its answer.

    Args:
        data_source: Name of the data set, for error messages.
        solution_str: The response, without its prompt.
        ground_truth: The answer: a number, or a text such as `72`, `\frac{1}{2}`, `\boxed{72}` or
            a solution of GSM8K that ends in `#### 72`.
        extra_info: Not used, as whatever else verl passes.
        **kwargs: Not used.

    Returns:
        `score` and `acc` 0.0 or 1.0; `format` 1.0 if an answer is where it is looked for; and
        `reason`: `correct`, `wrong`, `too_long`, `no_answer` or `long_answer`.

    Raises:
        DataError: The ground truth holds no answer, or the response is not text.
        EnvironmentCheckError: The known version of math-verify is not installed.
    """
    gold = _read_gold(str(ground_truth))
    if not gold or isinstance(ground_truth, bool):
        needed = "a number, or a text with one answer of at most 200 characters"
        raise bad_ground_truth(data_source, ground_truth, needed)
    require_text(data_source, solution_str)
    answer, reason = _final_answer(solution_str)
    if answer is None:
        return reward_result(reason, well_formed=False)
    right = load_scorer().verify(gold, _parse(answer), timeout_seconds=None)
    return reward_result("correct" if right else "wrong", well_formed=True)


def load_scorer() -> Any:
    """Import math-verify."""
    verifier = load("math_verify")
    # Otherwise it says that its own time limit is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return verifier


@lru_cache(maxsize=1024)
def _read_gold(truth: str) -> list[Any]:
    answer, reason = _final_answer(truth)
    if reason == "no_answer" and len(truth) <= _MAX_ANSWER_CHARACTERS:
        answer = truth.strip().strip("$")
    return _parse(answer) if answer else []


def _parse(answer: str) -> list[Any]:
    return load_scorer().parse(f"${answer}$", parsing_timeout=None)


def _final_answer(text: str) -> tuple[str | None, str]:
    """Return the answer of a response without blanks around it, or None and why there is none."""
    answer, reason = last_box(text, _MAX_ANSWER_CHARACTERS)
    if reason == "no_box":
        answer = last_answer(text)
        if answer is None and _MARK in text:
            answer = text.rpartition(_MARK)[2].strip().partition("\n")[0]
        reason = "no_answer" if answer is None else ""
    elif reason == "unclosed_box":
        reason = "no_answer"
    if answer is not None:
        answer = answer.strip().strip("$").strip()
        if not answer:
            return None, "no_answer"
        if len(answer) > _MAX_ANSWER_CHARACTERS:
            return None, "long_answer"
    return answer, "long_answer" if reason == "long_box" else reason
