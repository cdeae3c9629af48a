"""Positive and negative sample reinforcement, PSR, NSR and W-REINFORCE (arXiv 2506.01347).

    J = E[w_pos sum_{y: R=1} pi(y|x) - w_neg sum_{y: R=-1} pi(y|x)],   R in {+1, -1}
    A_i = w_pos for R_i = 1,  -w_neg for R_i = -1;   no baseline

    PSR: w_pos = 1, w_neg = 0.   NSR: 0, 1.   W-REINFORCE: lambda, 1 with lambda = 0.1

Sources: equations 2 to 4 and 9 by a note on the paper's v2; the advantages, PPO's clip 0.2 / 0.2
and the mean over tokens in the authors' code (RLVR-Decomposed). A reward of 0 is a failure and
becomes -1, as in that code.

The text's expectation is over all responses, so those of weight 0 count in the mean here. The
code drops them from the batch before it is split: it divides by fewer, which Adam hides, and makes
fewer updates a step. Left out: its bonus of 1e-4 for entropy (`actor.entropy_coeff`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hpo_verl.algorithms import base
from hpo_verl.core.rewards import successes
from hpo_verl.core.settings import require_number
from hpo_verl.errors import ConfigError

SECTION = "w_reinforce"


@dataclass(frozen=True)
class WReinforceSettings:
    """Settings of all three, under `algorithm.w_reinforce`; the defaults are W-REINFORCE's.

    Attributes:
        positive_weight: Weight of successes, at least 0; the paper's lambda.
        negative_weight: Weight of failures, at least 0; not both may be 0.
    """

    positive_weight: float = 0.1
    negative_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("positive_weight", "negative_weight"):
            require_number(f"algorithm.{SECTION}.{name}", getattr(self, name), 0.0)
        if not self.positive_weight and not self.negative_weight:
            raise ConfigError(f"algorithm.{SECTION}: both weights are 0, so nothing is learned")


@dataclass(frozen=True)
class PSRSettings(WReinforceSettings):
    """The same with PSR's defaults."""

    positive_weight: float = 1.0
    negative_weight: float = 0.0


@dataclass(frozen=True)
class NSRSettings(WReinforceSettings):
    """The same with NSR's defaults."""

    positive_weight: float = 0.0
    negative_weight: float = 1.0


def weighted_rewards(rollout: base.Rollout, settings: WReinforceSettings) -> base.Advantages:
    """The reward +1 or -1 times the weight of its sign.

    Returns:
        `[batch]` float64, 0 for rows that are not live; and the counts of either reward.

    Raises:
        DataError: Rewards are neither 1 and 0 nor 1 and -1.
    """
    succeeded = successes(rollout.rewards, rollout.live)
    failed = rollout.live & ~succeeded
    signs = succeeded.double() - failed.double()
    return base.Advantages(
        values=settings.positive_weight * succeeded.double()
        - settings.negative_weight * failed.double(),
        unweighted=signs,
        alpha=float(settings.negative_weight),
        positives=int(succeeded.sum()),
        negatives=int(failed.sum()),
    )


def _algorithm(name: str, weighted: str, settings: type[WReinforceSettings]) -> base.Algorithm:
    return base.Algorithm(
        name,
        ("2506.01347",),
        f"{base.CLIP}, A = {weighted}",
        base.TOKEN_MEAN,
        base.Estimator(
            name,
            weighted_rewards,
            settings,
            section=SECTION,
            weights_by_sign=True,
            compares=False,
            check=base.refuse_kl_in_reward,
        ),
    )


ALGORITHMS = (
    _algorithm("psr", "1 for successes, 0 for failures", PSRSettings),
    _algorithm("nsr", "0 for successes, -1 for failures", NSRSettings),
    _algorithm("w_reinforce", "0.1 for successes, -1 for failures", WReinforceSettings),
)
