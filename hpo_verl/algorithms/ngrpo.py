"""Negative-enhanced group relative policy optimization, NGRPO (arXiv 2509.18851).

    A_i = (R_i - m_g) / (s_g + 1e-6),   m_g, s_g: mean and unbiased standard deviation over the
                                        group and one virtual reward R_max
    l_t = -min(r_t A, clip(r_t, 1 - e, 1 + e) A),   e = 0.24 for A > 0,  0.16 for A < 0

A group of failures alone gets a negative advantage, one of successes alone exactly 0.

The minimum reads one bound of the clip for each sign: the upper one for A > 0, the lower one for
A < 0. The loss is therefore PPO's with clip_ratio_low 0.16 and clip_ratio_high 0.24, as in the
authors' code (nangongrui-ngr/NGRPO), and verl's `vanilla` computes it; a test compares both.

Sources: the authors' code, and by notes the paper's sections 4.1 and 4.2 with its example (one
success of eight: 1.76 and -0.50, which the unbiased deviation gives). The mean over tokens is the
code's. The code gives a group of one the advantage R; here it is treated like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_number
from hpo_verl.errors import DataError


@dataclass(frozen=True)
class NGRPOSettings:
    """Settings of NGRPO's advantage, under `algorithm.ngrpo`.

    Attributes:
        max_reward: R_max, the largest reward of the task.
    """

    max_reward: float = 1.0

    def __post_init__(self) -> None:
        require_number("algorithm.ngrpo.max_reward", self.max_reward, -float("inf"))


def calibrated_advantages(rollout: base.Rollout, settings: NGRPOSettings) -> base.Advantages:
    """GRPO's advantages with one virtual response of the largest reward in every group.

    Returns:
        `[batch]` float64; 0 for rows that are not live.

    Raises:
        DataError: A live reward is larger than the largest one.
    """
    rewards, live = rollout.rewards, rollout.live
    above = live & (rewards > settings.max_reward)
    if bool(above.any()):
        raise DataError(
            f"reward {rewards[above][0].item():g} of response {int(above.nonzero()[0])}: above "
            f"algorithm.ngrpo.max_reward = {settings.max_reward:g}"
        )
    groups = torch.unique(rollout.groups)
    with_virtual = rollout._replace(
        rewards=torch.cat([rewards, rewards.new_full(groups.shape, settings.max_reward)]),
        groups=torch.cat([rollout.groups, groups]),
        live=torch.cat([live, torch.ones_like(groups, dtype=torch.bool)]),
    )
    return base.Advantages(with_virtual.grouped().advantages[: len(rewards)])


ALGORITHMS = (
    base.Algorithm(
        "ngrpo",
        ("2509.18851",),
        f"{base.CLIP}, A by a group with one more R_max",
        base.TOKEN_MEAN,
        base.Estimator(
            "ngrpo",
            calibrated_advantages,
            NGRPOSettings,
            section="ngrpo",
            check=base.refuse_kl_in_reward,
        ),
    ),
)
