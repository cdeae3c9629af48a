"""Which training questions come next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hpo_verl.algorithms.spo import SPOSettings, ValueTracker
from hpo_verl.core.ratios import mean_drift
from hpo_verl.lab.policy import Policy, Prompts
from hpo_verl.lab.sampling import Responses


class QuestionSource(Protocol):
    """Draws questions, by their place in the training set."""

    def draw(self, count: int) -> list[int]:
        """Draw the questions of a batch."""
        ...

    def values(self, questions: torch.Tensor) -> torch.Tensor | None:
        """Success rate that each question is expected to have, where somebody keeps one."""
        ...

    def observe(
        self, policy: Policy, questions: torch.Tensor, prompts: Prompts, responses: Responses,
        rewards: torch.Tensor,
    ) -> None:  # fmt: skip
        """Learn from a batch, before the policy is updated."""
        ...


class Shuffled:
    """Every question once per epoch, in a new order each.

    Args:
        count: Number of questions.
        stream: Seed of the orders, to which each epoch adds its number.
    """

    def __init__(self, count: int, stream: tuple[int, ...]) -> None:
        self._order = self._endless(count, stream)

    @staticmethod
    def _endless(count: int, stream: tuple[int, ...]) -> Iterator[int]:
        epoch = 0
        while True:
            yield from np.random.default_rng((*stream, epoch)).permutation(count).tolist()
            epoch += 1

    def draw(self, count: int) -> list[int]:
        """Take the next questions."""
        return [next(self._order) for _ in range(count)]

    def values(self, questions: torch.Tensor) -> None:
        """Nothing is kept."""

    def observe(
        self, policy: Policy, questions: torch.Tensor, prompts: Prompts, responses: Responses,
        rewards: torch.Tensor,
    ) -> None:  # fmt: skip
        """Nothing is learnt."""


class _LastResponse(NamedTuple):
    tokens: torch.Tensor
    log_probs: torch.Tensor


class SingleStream:
    """SPO's prompts: drawn by the tracker's weights, all different within a batch.

    Args:
        count: Number of questions.
        settings: Of SPO.
        seed: Of the draws.
    """

    def __init__(self, count: int, settings: SPOSettings, seed: int) -> None:
        self.tracker = ValueTracker(count, settings)
        self._generator = torch.Generator().manual_seed(seed)
        self._last: dict[int, _LastResponse] = {}

    def draw(self, count: int) -> list[int]:
        """Draw by weight, without replacement."""
        return self.tracker.draw(count, self._generator)

    def values(self, questions: torch.Tensor) -> torch.Tensor:
        """Running success rate v of each question, `[questions]` float64."""
        return self.tracker.values()[questions]

    def observe(
        self, policy: Policy, questions: torch.Tensor, prompts: Prompts, responses: Responses,
        rewards: torch.Tensor,
    ) -> None:  # fmt: skip
        """Count the rewards, after forgetting by how far the policy has moved.

        Args:
            policy: The one that gave the responses.
            questions: Places of the prompts, `[prompts]` int64.
            prompts: The prompts.
            responses: One per prompt.
            rewards: In [0, 1], `[prompts]`.
        """
        settings = self.tracker.settings
        drift = torch.zeros(len(questions), dtype=torch.float64)
        if settings.adaptive:
            rows = questions.tolist()
            seen = [i for i, row in enumerate(rows) if row in self._last]
            if seen:
                chosen = Prompts(prompts.tokens[seen], prompts.lengths[seen])
                drift[seen] = self._drift(policy, chosen, [self._last[rows[i]] for i in seen])
            for row, tokens, mask, log_probs, _ in zip(rows, *responses, strict=True):
                self._last[row] = _LastResponse(tokens[mask], log_probs[mask])
        self.tracker.update(questions, rewards, settings.forgetting(drift))

    @torch.no_grad()
    def _drift(self, policy: Policy, prompts: Prompts, last: list[_LastResponse]) -> torch.Tensor:
        tokens, log_probs = (
            pad_sequence([*one], batch_first=True) for one in zip(*last, strict=True)
        )
        lengths = torch.tensor([len(one.tokens) for one in last], device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        now = policy.response_log_probs(prompts, tokens, mask)
        return mean_drift(now, log_probs, mask).cpu()
