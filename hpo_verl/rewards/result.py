"""What every reward returns, how it finds an answer in a response, and what it refuses."""

from __future__ import annotations

from typing import Any, TypedDict

from hpo_verl.errors import DataError

# Longer responses score 0 unread: about 25,000 tokens, far above any recipe's limit.
MAX_RESPONSE_CHARACTERS = 100_000

_OPEN, _CLOSE, _BOX = "<answer>", "</answer>", "\\boxed{"


class RewardResult(TypedDict):
    """A reward as verl's reward loop takes it; the keys are the same on every call.

    `score` is the reward (0.0 or 1.0), `acc` the same value under the name by which
    verl reports accuracy in validation, `format` 1.0 if the answer is where and as
    the prompt asks for it, right or wrong, and `reason` a short code that says why.
    """

    score: float
    acc: float
    format: float
    reason: str


def reward_result(reason: str, *, well_formed: bool) -> RewardResult:
    """Return a binary reward, 1 for the reason `correct` alone, with its format mark."""
    score = float(reason == "correct")
    return {"score": score, "acc": score, "format": float(well_formed), "reason": reason}


def require_text(data_source: str, response: object) -> None:
    """Raise a DataError where a response is not text."""
    if not isinstance(response, str):
        raise DataError(f"{data_source}: solution_str is {type(response).__name__}; text is needed")


def last_answer(response: str) -> str | None:
    """Return what stands between the last opening tag that is closed and its closing tag."""
    start = response.rfind(_OPEN, 0, max(0, response.rfind(_CLOSE)))
    if start < 0:
        return None
    start += len(_OPEN)
    return response[start : response.index(_CLOSE, start)]


def last_box(response: str, most: int) -> tuple[str | None, str]:
    r"""Return what the last `\boxed{}` holds, of so many characters at most, or None and why not.

    The reasons are `too_long`, `no_box`, `unclosed_box` and `long_box`.
    """
    if len(response) > MAX_RESPONSE_CHARACTERS:
        return None, "too_long"
    start = response.rfind(_BOX)
    if start < 0:
        return None, "no_box"
    start += len(_BOX)
    depth = 1
    for index in range(start, min(len(response), start + most)):
        if response[index] == "{":
            depth += 1
        elif response[index] == "}":
            depth -= 1
            if depth == 0:
                return response[start:index], ""
    return None, "unclosed_box" if len(response) - start <= most else "long_box"


def bad_ground_truth(data_source: str, ground_truth: object, needed: str) -> DataError:
    """The error of a ground truth that is not as needed, whatever it is."""
    try:
        shown = repr(ground_truth)[:100]
    except Exception:  # nested too deep, or an integer of too many digits
        shown = f"of type {type(ground_truth).__name__}"
    return DataError(f"{data_source}: ground_truth is {shown}; needed: {needed}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without a key that is given twice, of which Python keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is given twice: {', '.join(key for key, _ in pairs)[:100]}")
    return found
