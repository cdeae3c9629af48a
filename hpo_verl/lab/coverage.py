"""pass@k: how many questions are solved by one of k answers."""

from __future__ import annotations

from collections.abc import Sequence

from hpo_verl.lab.policy import Policy
from hpo_verl.lab.rollout import Stream, answers
from hpo_verl.lab.tasks import Question, Task
from hpo_verl.verl_plugin.trainer.pass_at_k import pass_at_k


def coverage(
    policy: Policy,
    task: Task,
    questions: Sequence[Question],
    stream: Stream,
    longest: int,
    samples: int,
) -> dict[str, float]:
    """pass@k over questions for k = 1, 2, 4, ... up to `samples`, by the unbiased estimate.

    Returns:
        `pass@k` by name, fractions.
    """
    repeated = [question for question in questions for _ in range(samples)]
    rewards = answers(policy, task, repeated, stream, longest).rewards.view(-1, samples)
    solved = (rewards > 0).sum(dim=-1).tolist()
    ks = [2**i for i in range(samples.bit_length())]
    return {
        f"pass@{k}": sum(pass_at_k(samples, count, k) for count in solved) / len(solved) for k in ks
    }
