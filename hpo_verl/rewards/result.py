"""What every reward returns, the one bound on what it reads, and how it refuses a ground truth."""

from __future__ import annotations

from typing import Any, TypedDict

from hpo_verl.errors import DataError

# Longer responses score 0 unread: about 25,000 tokens, far above any recipe's limit.
MAX_RESPONSE_CHARACTERS = 100_000


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
