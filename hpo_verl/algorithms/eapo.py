"""Efficiency-aware policy optimisation, EAPO (IterResearch, arXiv 2511.07327).

    r_t = gamma^(T - t) R_T,   A_t = (r_t - mean) / (std + 1e-6)   over all rounds of the prompt

A session of an agent loop has T rounds, each an output of its own; R_T is the reward of the last.
So rounds far from the success that they lead to are worth less, and of two successes the one in
fewer rounds more. The loss is GSPO's, averaged over rounds: a session weighs by their number.

Decided here: gamma 0.995, since none was found in what could be read of the paper; groups are all
rounds of all sessions of a prompt. The paper draws the rounds of a step down to a multiple of the
data-parallel ranks; verl fills them up with rows that count for nothing. Where every session has
one output it is GRPO's advantage, and `hpo/eapo_rounds` is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_number


@dataclass(frozen=True)
class EAPOSettings:
    """Settings under `algorithm.eapo`.

    Attributes:
        discount: gamma, in (0, 1]; 1 gives every round the session's reward.
    """

    discount: float = 0.995

    def __post_init__(self) -> None:
        require_number("algorithm.eapo.discount", self.discount, 0.0, 1.0, open_low=True)


def discounted_advantages(rollout: base.Rollout, settings: EAPOSettings) -> base.Advantages:
    """Compare the discounted rewards of all rounds of a prompt.

    Returns:
        `[batch, response]` float64; and the mean number of rounds of a session.
    """
    rows = torch.arange(len(rollout.mask), device=rollout.mask.device)
    final = rows if rollout.final is None else rollout.final
    output: torch.Tensor = rollout.extras["output"]
    factor = settings.discount ** (output[final] - output).double()

    def of_rounds(rewards: torch.Tensor) -> torch.Tensor:
        # In the rewards' own type, whose rounding tells which are equal.
        return (rewards[final].double() * factor).to(rewards.dtype)

    rounds = rollout.live[final]
    by_round = rollout._replace(
        rewards=of_rounds(rollout.rewards),
        scores=None if rollout.scores is None else of_rounds(rollout.scores),
        live=rounds,
    )
    advantages = by_round.grouped().advantages
    sessions = max(int(rollout.live.sum()), 1)
    return base.Advantages(
        advantages.unsqueeze(-1) * rollout.mask,
        statistics={"eapo_rounds": int(rounds.sum()) / sessions},
    )


ALGORITHMS = (
    base.Algorithm(
        "eapo",
        ("2511.07327",),
        "-min(s A, clip(s, 1 - e_low, 1 + e_high) A), A of gamma^(T - t) R_T over all rounds of "
        "a prompt",
        base.SEQ_MEAN_TOKEN_MEAN,
        base.Estimator(
            "eapo", discounted_advantages, EAPOSettings, section="eapo", needs=("output",)
        ),
        base.GSPO,
    ),
)
