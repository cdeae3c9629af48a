"""What every reward returns, and the one bound on what it reads."""

from __future__ import annotations

from typing import TypedDict

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
