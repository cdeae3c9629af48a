"""Maximum likelihood reinforcement learning, MaxRL (arXiv 2602.02710).

    A_i = (r_i - p) / p,   p = mean of r over the group, r in {0, 1};   0 where p = 0

In expectation over groups of N this is the gradient of log p(x) cut after the first N - 1 terms
of its series in (1 - p), where r_i - p is that of p(x).

Sources: the authors' code (tajwarfahim/maxrl), which adds 1e-6 to p (`epsilon`), with PPO's clip
0.2 / 0.2 and the mean over tokens; the estimator with and without -1 (`baseline`) and the zero at
p = 0 by notes on the paper. In the code a group of one gets r / 1e-6; here it gets 0, as the
equation says. Rewards of 1 and -1 are read as 1 and 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.rewards import successes
from hpo_verl.core.settings import require_flag, require_number


@dataclass(frozen=True)
class MaxRLSettings:
    """Settings of MaxRL, under `algorithm.maxrl`.

    Attributes:
        baseline: Whether p is subtracted, the paper's control variate; without it A = r / p.
        epsilon: Added to p below the line, at least 0; 1e-6 in the authors' code.
    """

    baseline: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        require_flag("algorithm.maxrl.baseline", self.baseline)
        require_number("algorithm.maxrl.epsilon", self.epsilon, 0.0)


def success_normalized_advantages(
    rollout: base.Rollout, settings: MaxRLSettings
) -> base.Advantages:
    """Success minus the group's rate of success, divided by that rate.

    Returns:
        `[batch]` float64; 0 for rows that are not live and groups without a success.

    Raises:
        DataError: Rewards are neither 1 and 0 nor 1 and -1.
    """
    success = successes(rollout.rewards, rollout.live).float()
    centred = rollout._replace(rewards=success, normalize_by_std=False).grouped().advantages
    rate = success.double() - centred
    above = centred if settings.baseline else success.double()
    below = (rate + settings.epsilon).masked_fill(rate <= 0.0, 1.0)
    return base.Advantages(torch.where(rate > 0.0, above / below, 0.0))


ALGORITHMS = (
    base.Algorithm(
        "maxrl",
        ("2602.02710",),
        f"{base.CLIP}, A = (r - mean) / mean",
        base.TOKEN_MEAN,
        base.Estimator(
            "maxrl",
            success_normalized_advantages,
            MaxRLSettings,
            section="maxrl",
            check=base.refuse_kl_in_reward,
        ),
    ),
)
