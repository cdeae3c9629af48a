"""Tasks of reasoning-gym, each scored by its own scorer.

A task's scorer gives part of the reward for almost anything: 0.01 to 0.05 for an answer that is
wrong, or a right one's share of a longer text. The reward here is 1 where that score is 1 and 0
elsewhere; with `raw` it is the score itself.

The answer is what the last `<answer>` block of the response holds. Some scorers evaluate it as
Python code. Four call `eval`, which becomes `ast.literal_eval` here; five call `parse_expr` of
sympy, and these get digits, operators, single letters and names of functions only. (`Integral(f)`,
with which a question answers itself, is none of them.) What remains, such as 9**9**9, takes time
only: the guarded reward manager bounds it.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hpo_verl.rewards.result import (
    MAX_RESPONSE_CHARACTERS,
    RewardResult,
    bad_ground_truth,
    last_answer,
    require_text,
    reward_result,
)
from hpo_verl.rewards.third_party import load

# The longest right answer, that of a tower of Hanoi, has 4,063.
_MAX_ANSWER_CHARACTERS = 10_000
_MAX_FORMULA_CHARACTERS = 500
# Their scorers call eval.
LITERALS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
# Their scorers call sympy's parse_expr, which calls eval.
FORMULAS = (
    *("countdown", "puzzle24", "polynomial_multiplication"),
    *("simple_integration", "intermediate_integration"),
)
_FUNCTIONS = (
    *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan"),
    *("sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "pi", "Abs"),
)
_FORMULA = re.compile(r"[A-Za-z0-9 \t\r\n+*/^().,-]*")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    raw: bool = False,
    **kwargs: Any,
) -> RewardResult:
    """Score one response to a question of reasoning-gym.

    Args:
        data_source: Name of the data set, for error messages.
        solution_str: The response, without its prompt.
        ground_truth: Task, configuration and entry, as `python -m data_prep.reasoning_gym` writes.
        extra_info: Not used, as whatever else verl passes.
        raw: Whether `score` is that of the task's scorer. `acc` is 0.0 or 1.0 all the same.
        **kwargs: Not used.

    Returns:
        `score` and `acc`; `format` 1.0 if there is an answer block; and `reason`: `correct`,
        `wrong`, `unreadable` (the scorer raised), `refused` (too long, or no formula),
        `too_long` or `no_answer`.

    Raises:
        DataError: The ground truth is malformed, or the response is not text.
        EnvironmentCheckError: The known version of reasoning-gym is not installed.
    """
    try:
        truth = ast.literal_eval(ground_truth)
        task, options, entry = truth["task"], json.dumps(truth["config"]), dict(truth["entry"])
        scorer = _scorer(task, options)
    except (ValueError, TypeError, LookupError, SyntaxError, RecursionError, MemoryError) as error:
        needed = "what data_prep.reasoning_gym writes"
        raise bad_ground_truth(data_source, ground_truth, needed) from error
    require_text(data_source, solution_str)
    if len(solution_str) > MAX_RESPONSE_CHARACTERS:
        return reward_result("too_long", well_formed=False)
    answer = last_answer(solution_str)
    if answer is None:
        return reward_result("no_answer", well_formed=False)
    answer = answer.strip()
    if not is_permitted(task, answer):
        return reward_result("refused", well_formed=True)
    try:
        score = float(scorer.score_answer(answer, entry))
    except Exception:
        # Of text that no integer, list, ... can be read from, some scorers raise.
        return reward_result("unreadable", well_formed=True)
    result = reward_result("correct" if score >= 1 else "wrong", well_formed=True)
    return {**result, "score": score} if raw else result


def load_scorer() -> Any:
    """Import reasoning-gym, and take `eval` from the scorers that call it with an answer."""
    gym = load("reasoning_gym")
    datasets = importlib.import_module("reasoning_gym.factory").DATASETS
    for task in LITERALS:
        vars(importlib.import_module(datasets[task][0].__module__))["eval"] = ast.literal_eval
    return gym


def is_permitted(task: str, answer: str) -> bool:
    """Whether an answer may reach the task's scorer: sympy gets no quotes and no unknown words."""
    if task not in FORMULAS:
        return len(answer) <= _MAX_ANSWER_CHARACTERS
    if len(answer) > _MAX_FORMULA_CHARACTERS or not _FORMULA.fullmatch(answer):
        return False
    return all(len(word) == 1 or word in _FUNCTIONS for word in re.findall("[A-Za-z]+", answer))


@lru_cache(maxsize=64)
def _scorer(task: str, options: str) -> Any:
    return load_scorer().create_dataset(task, **{"seed": 0, **json.loads(options)})
