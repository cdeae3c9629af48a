"""Countdown: reach a target with given numbers, each used once, by + - * /.

Binary reward, exact: 1 if and only if the last complete `<answer>...</answer>`
block of the response holds one expression (`expression.py` has the grammar) whose
integers are the given numbers, each as often as given, and whose value is the
target as a rational number. The expression may be followed by `= N` if N is the
target. An answer tag that is opened and never closed is no block.

A response is text from a model and counts as hostile: it is bounded first, never
evaluated as code, and nothing in it raises. A ground truth is data of ours: a
malformed one raises DataError, because scoring it 0 would hide it.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from hpo_verl.errors import DataError
from hpo_verl.rewards.expression import normalise, read_expression, read_integer
from hpo_verl.rewards.result import (
    MAX_RESPONSE_CHARACTERS,
    RewardResult,
    bad_ground_truth,
    last_answer,
    require_text,
    reward_result,
    unique_keys,
)

# An answer longer than this is not read: room for blanks around an expression.
_MAX_ANSWER_CHARACTERS = 1_000


class CountdownResult(RewardResult):
    """A reward with `brevity`: 1 for an empty response, falling to 0 at `brevity_characters`."""

    brevity: float


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Mapping[str, Any] | str,
    extra_info: Mapping[str, Any] | None = None,
    brevity_characters: int = 4_000,
    **kwargs: Any,
) -> CountdownResult:
    """Score one response to a Countdown puzzle.

    Args:
        data_source: Name of the data set, for error messages.
        solution_str: The response, without its prompt.
        ground_truth: `{"target": int, "numbers": [int, ...]}`, of Python or numpy
            types, or the same as a JSON string.
        extra_info: Not used, as whatever else verl passes.
        brevity_characters: From how many characters on `brevity` is 0, at least 1; the default is
            about 1,024 tokens.
        **kwargs: Not used.

    Returns:
        `score` and `acc` 0.0 or 1.0; `format` 1.0 if there is an answer block whose
        content is an expression, with or without `= N`; `brevity`, 1 - characters /
        `brevity_characters`, at least 0, right or wrong; and `reason`: `correct`,
        `too_long`, `no_answer`, `not_an_expression`, `wrong_numbers`, `division_by_zero`,
        `wrong_value` or `wrong_equation` (`= N`, N not the target).

    Raises:
        DataError: The ground truth is malformed, the response is not text, or
            `brevity_characters` is no number from 1.
    """
    target, numbers = _read_ground_truth(ground_truth, data_source)
    require_text(data_source, solution_str)
    if not isinstance(brevity_characters, int) or brevity_characters < 1:
        raise DataError(
            f"{data_source}: brevity_characters = {brevity_characters!r}: must be an integer from 1"
        )
    brevity = max(0.0, 1.0 - len(solution_str) / brevity_characters)
    return {**_result(solution_str, target, numbers), "brevity": brevity}


def _result(solution_str: str, target: int, numbers: list[int]) -> RewardResult:
    if len(solution_str) > MAX_RESPONSE_CHARACTERS:
        return reward_result("too_long", well_formed=False)
    answer = last_answer(solution_str)
    if answer is None:
        return reward_result("no_answer", well_formed=False)
    if len(answer) > _MAX_ANSWER_CHARACTERS:
        return reward_result("not_an_expression", well_formed=False)
    text, equals, result = normalise(answer).strip().partition("=")
    expression = read_expression(text)
    claimed = read_integer(result) if equals else target
    if expression is None or claimed is None:
        return reward_result("not_an_expression", well_formed=False)
    if sorted(expression.integers) != numbers:
        return reward_result("wrong_numbers", well_formed=True)
    if expression.denominator == 0:
        return reward_result("division_by_zero", well_formed=True)
    if not expression.equals(target):
        return reward_result("wrong_value", well_formed=True)
    if claimed != target:
        return reward_result("wrong_equation", well_formed=True)
    return reward_result("correct", well_formed=True)


def _read_ground_truth(
    ground_truth: Mapping[str, Any] | str, data_source: str
) -> tuple[int, list[int]]:
    """Return the target and the sorted numbers."""
    try:
        if isinstance(ground_truth, str):
            ground_truth = json.loads(ground_truth, object_pairs_hook=unique_keys)
        return _integer(ground_truth["target"]), sorted(_integers(ground_truth["numbers"]))  # type: ignore[index]
    except Exception as error:
        needed = '{"target": integer, "numbers": [integer, ...]} or the same as JSON'
        raise bad_ground_truth(data_source, ground_truth, needed) from error


def _integers(values: Iterable[Any]) -> list[int]:
    if isinstance(values, str | bytes | Mapping):
        raise TypeError("numbers must be a list")
    integers = [_integer(value) for value in values]
    if not integers:
        raise ValueError("numbers must not be empty")
    return integers


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a boolean is not an integer")
    return operator.index(value)
