"""Responses to a step's questions, with their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hpo_verl.lab.policy import Policy, Prompt, Responses
from hpo_verl.lab.tasks import Question, Task

# Streams of random numbers that a seed has.
SAMPLING, EVALUATION, COVERAGE = 1, 2, 3
Stream = tuple[int, ...]


class Rollout(NamedTuple):
    """Responses; those of a prompt are neighbours."""

    questions: torch.Tensor  # index of every response's question in the training set, `[batch]`
    prompts: list[Prompt]  # tokens of every response's prompt
    responses: Responses  # `[batch, time]` each
    numbers: dict[str, torch.Tensor]  # by name, as `Task.score` gives them, `[batch]` each

    @property
    def rewards(self) -> torch.Tensor:
        """`[batch]`."""
        return self.numbers["score"]

    def at(self, rows: torch.Tensor) -> Rollout:
        """Some of the rows."""
        return Rollout(
            self.questions[rows],
            [self.prompts[row] for row in rows.tolist()],
            Responses(*(tensor[rows] for tensor in self.responses)),
            {name: values[rows] for name, values in self.numbers.items()},
        )

    def described(self, ends: Sequence[int]) -> dict[str, float]:
        """Statistics of the responses; `ends` are the tokens that end one.

        Returns:
            `entropy`, nats per token: of the tokens that were drawn, an estimate without another
            pass. `response_length`, its standard deviation, its means over right and wrong
            responses (NaN where there is none), in tokens. `truncated`: share of responses that
            reached the longest length without an end.
        """
        _, mask, log_probs = self.responses
        lengths, right = mask.sum(dim=-1).double(), self.rewards > 0
        return {
            "entropy": -float(log_probs.sum() / mask.sum()),
            "response_length": float(lengths.mean()),
            "response_length_std": float(lengths.std()),
            "response_length_right": float(lengths[right].mean()),
            "response_length_wrong": float(lengths[~right].mean()),
            "truncated": float((~self.responses.ended(ends)).double().mean()),
        }


def join(batches: Sequence[Rollout]) -> Rollout:
    """One rollout of several."""
    return Rollout(
        torch.cat([batch.questions for batch in batches]),
        [prompt for batch in batches for prompt in batch.prompts],
        Responses(*map(torch.cat, zip(*(b.responses for b in batches), strict=True))),
        {name: torch.cat([b.numbers[name] for b in batches]) for name in batches[0].numbers},
    )


def answers(
    policy: Policy,
    task: Task,
    questions: Sequence[Question],
    stream: Stream,
    longest: int,
    temperatures: Sequence[float] | None = None,
) -> Rollout:
    """Answer each of the questions once; `stream` seeds the sampling.

    The rollout's `questions` are places in this list.
    """
    # Neighbours are often the same question, whose prompt is read once.
    encoded: dict[int, Prompt] = {}
    for question in questions:
        if id(question) not in encoded:
            encoded[id(question)] = policy.encode(question.messages)
    prompts = [encoded[id(question)] for question in questions]
    seeds = np.random.default_rng(stream).integers(2**63, size=len(questions)).tolist()
    responses = policy.sample(prompts, seeds, longest, temperatures)
    pairs = zip(policy.decode(responses), questions, strict=True)
    scores = [task.score(text, question.ground_truth) for text, question in pairs]
    numbers = {name: torch.tensor([one[name] for one in scores]) for name in scores[0]}
    return Rollout(torch.arange(len(questions)), prompts, responses, numbers)


def means(
    policy: Policy, task: Task, questions: Sequence[Question], stream: Stream, longest: int
) -> dict[str, float]:
    """Mean of each of the task's numbers by name, over one answer per question."""
    numbers = answers(policy, task, questions, stream, longest).numbers
    return {name: float(values.double().mean()) for name, values in numbers.items()}
