"""An algorithm of another package: a soft bound on the ratio.

l_t = -s tanh(r_t / s) A_t
"""

from __future__ import annotations

from dataclasses import dataclass

from hpo_verl.algorithms.base import TOKEN_MEAN, Algorithm, Loss, TokenBatch
from hpo_verl.core.settings import require_number
from hpo_verl.core.surrogate import TokenLoss


@dataclass(frozen=True)
class ExampleSettings:
    """Settings under `actor_rollout_ref.actor.policy_loss`.

    Attributes:
        scale: Bound s of the ratio, above 0.
    """

    scale: float = 2.0

    def __post_init__(self) -> None:
        path = "actor_rollout_ref.actor.policy_loss.scale"
        require_number(path, self.scale, 0.0, open_low=True)


def example_loss(batch: TokenBatch, settings: ExampleSettings) -> TokenLoss:
    """Loss of every token; its slope is -r (1 - tanh^2) A."""
    ratio = batch.log_ratio.exp()
    bounded = (ratio / settings.scale).tanh()
    slopes = -ratio * (1.0 - bounded.square()) * batch.advantages
    return TokenLoss(-settings.scale * bounded * batch.advantages, slopes)


ALGORITHMS = (
    Algorithm(
        "example",
        ("0000.00000",),
        "-s tanh(r / s) A",
        TOKEN_MEAN,
        loss=Loss(
            "example_loss",
            example_loss,
            ExampleSettings,
            aggregations=(TOKEN_MEAN,),
            proportional=True,
        ),
    ),
)
