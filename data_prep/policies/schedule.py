"""How long a warm start trains. No torch, so that a policy is checked without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How long the warm start trains, and on which mixture.

    Mostly worked demonstrations teach the skill; then mostly unworked ones teach the
    habit of using it seldom. Steps are batches; a direct share is that of unworked
    demonstrations, of which the last sets the policy's success.
    """

    skill_steps: int = 1200
    habit_steps: int = 150
    batch_size: int = 16
    skill_direct_share: float = 0.17
    habit_direct_share: float = 0.88

    @property
    def steps(self) -> int:
        """All batches."""
        return self.skill_steps + self.habit_steps
