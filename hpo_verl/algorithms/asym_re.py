"""Asymmetric REINFORCE, AsymRE (arXiv 2506.20520).

    J   = E_{y ~ pi_old}[log pi(y|x) (R - V(x) - delta)],   V(x) = mean of R over the group
    A_i = R_i - mean_g - delta,   delta = -0.1,   R in {+1, -1}

No importance ratio and no clip, also for batches of an older policy: a delta below 0 pushes
successes up more than failures down. Every response of a group of equal rewards, or of one, gets
-delta.

Sources: equations 1 and 4, the mean of 8 samples for V, R = +1 and -1 and delta = -0.1 by a note
on the paper's v2; its delta is in units of a reward of 1 and -1, so that rewards of 1 and 0 are
mapped. Trinity-RFT's code takes them as they are (`rewards: as_given`), and no baseline in a group
of one; here the equation holds there too. log pi(y|x) is a sum over tokens, so the recipe takes
verl's loss `gpg`, -log pi A, with `seq-mean-token-sum`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpo_verl.algorithms import base
from hpo_verl.core.rewards import successes
from hpo_verl.core.settings import require_choice, require_number


@dataclass(frozen=True)
class AsymRESettings:
    """Settings of AsymRE, under `algorithm.asym_re`.

    Attributes:
        baseline_shift: delta, added to the group's mean; from 0 on the paper's runs collapse.
        rewards: `sign`: rewards of 1 and 0, or 1 and -1, become 1 and -1, others are refused;
            `as_given`: any.
    """

    baseline_shift: float = -0.1
    rewards: str = "sign"

    def __post_init__(self) -> None:
        require_number("algorithm.asym_re.baseline_shift", self.baseline_shift, -math.inf)
        require_choice("algorithm.asym_re.rewards", self.rewards, ("sign", "as_given"))


def shifted_advantages(rollout: base.Rollout, settings: AsymRESettings) -> base.Advantages:
    """Reward minus the group's mean and the shift.

    Returns:
        `[batch]` float64, 0 for rows that are not live.

    Raises:
        DataError: With `sign`, rewards are neither 1 and 0 nor 1 and -1.
    """
    rewards = rollout.rewards
    if settings.rewards == "sign":
        rewards = 2.0 * successes(rewards, rollout.live).float() - 1.0
    centred = rollout._replace(rewards=rewards, normalize_by_std=False).grouped().advantages
    return base.Advantages((centred - settings.baseline_shift).masked_fill(~rollout.live, 0.0))


ALGORITHMS = (
    base.Algorithm(
        "asym_re",
        ("2506.20520",),
        "-log pi A, A = R - (mean + delta)",
        base.SEQ_MEAN_TOKEN_SUM,
        base.Estimator(
            "asym_re",
            shifted_advantages,
            AsymRESettings,
            section="asym_re",
            check=base.refuse_kl_in_reward,
        ),
        base.REINFORCE,
    ),
)
