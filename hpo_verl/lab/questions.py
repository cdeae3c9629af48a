"""The order of training questions where no estimator keeps a history of them."""

from __future__ import annotations

from typing import Any

import torch


class ShuffledQuestions:
    """Every question once per epoch, in a new order each; stands in for a `PromptHistory`.

    Args:
        count: Number of questions.
    """

    measures_drift = False

    def __init__(self, count: int) -> None:
        self._count = count
        self._left: list[int] = []

    def values(self) -> torch.Tensor:
        """Nothing is kept of a question, `[questions]` float64."""
        return torch.zeros(self._count, dtype=torch.float64)

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Take the next questions, by their place in the training set."""
        while len(self._left) < count:
            self._left += torch.randperm(self._count, generator=generator).tolist()
        drawn, self._left = self._left[:count], self._left[count:]
        return drawn

    def learn(self, *_: Any) -> dict[str, float]:
        """Nothing is learnt."""
        return {}
