"""Adaptive hybrid policy optimization, AHPO (MM-HELIX, arXiv 2510.08540).

    L = L_GRPO + xi L_NLL,   L_NLL = -(1/|y*|) sum_t log pi(y*_t),   xi = 1(successes < R)

y* is an expert's answer to the prompt, and xi is 1 where fewer than R of the prompt's own
responses succeed. So a prompt that the policy cannot solve is imitated, and left alone once it can.

The first of a prompt's n responses is y*, a text of its row: it is not sampled, but scored and
passed through the policy as the others are. It belongs to no group. Its A is
`weight` N / P where xi = 1, else 0, and its loss -A log pi; GRPO's advantages among the others are
multiplied by N / N_on, where N, N_on and P count the batch's responses, those of the policy, and
its prompts. So the mean over the batch (`seq-mean-token-mean`) is the mean of L over
prompts, L_GRPO being that over responses.

Sources: a note on the paper for L and xi; its public code (PhoenixZ810/MM-HELIX) has no training.
R was not found. Decided here: R = 1, so that only prompts without a success are imitated; one
expert's answer a prompt, in the place of one of the n; no ratio and no clip for y*; means per
response for both losses; the experts are Countdown's solver and TeleLogs' simulator, whose answers
the data's `extra_info.expert` holds. A KL term or an entropy bonus, where switched on, sees y* too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_integer, require_number
from hpo_verl.core.surrogate import TokenLoss
from hpo_verl.errors import ConfigError

PATH = "algorithm.ahpo"
IMITATED = "imitated"
"""The field that is above 0 at the tokens of an expert's answer."""


@dataclass(frozen=True)
class HybridSettings:
    """Settings of AHPO, under `algorithm.ahpo`.

    Attributes:
        by: Name of the expert's answer, a text in `extra_info`.
        successes: R, at least 0; 0 never imitates.
        weight: Weight of L_NLL, at least 0.
        success_reward: Smallest reward of a success.
    """

    by: str = "expert"
    successes: int = 1
    weight: float = 1.0
    success_reward: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.by, str) or not self.by:
            raise ConfigError(f"{PATH}.by = {self.by!r}: must be a text")
        require_integer(f"{PATH}.successes", self.successes, 0)
        require_number(f"{PATH}.weight", self.weight, 0.0)
        require_number(f"{PATH}.success_reward", self.success_reward, float("-inf"))


def openings(settings: HybridSettings) -> list[base.Opening]:
    """A prompt's first response is the expert's."""
    return [base.Opening(whole=settings.by)]


def advantages_with_expert(rollout: base.Rollout, settings: HybridSettings) -> base.Advantages:
    """GRPO's advantages of the policy's responses, and the weights of the expert's.

    Returns:
        `[batch]` float64; and where the expert's tokens are.
    """
    live, codes = rollout.live, rollout.groups
    given = rollout.extras["opening"] == 0
    expert, of_group = live & given, live & ~given
    scores = rollout.rewards if rollout.scores is None else rollout.scores
    success = of_group & (scores >= settings.success_reward)
    zeros = torch.zeros(int(codes.max()) + 1 if len(codes) else 0, dtype=torch.float64)
    zeros = zeros.to(live.device)
    few = zeros.index_add(0, codes, success.double()) < settings.successes
    prompts = max(float((zeros.index_add(0, codes, live.double()) > 0).sum()), 1.0)

    total, own = float(live.sum()), max(float(of_group.sum()), 1.0)
    advantages = rollout._replace(live=of_group).grouped().advantages * (total / own)
    imitated = expert & few.index_select(0, codes)
    return base.Advantages(
        advantages + imitated.double() * (settings.weight * total / prompts),
        # Those of the policy, by which an adaptive weight in front goes.
        positives=int((advantages > 0).sum()),
        negatives=int((advantages < 0).sum()),
        statistics={
            "ahpo_success": float(success.sum()) / own,
            "ahpo_expert_fraction": float(expert.sum()) / prompts,
            "ahpo_imitated_fraction": float(imitated.sum()) / prompts,
        },
        token_fields={IMITATED: (given.unsqueeze(-1) & rollout.mask).double()},
    )


def hybrid_loss(batch: base.TokenBatch, settings: object) -> TokenLoss:
    """The clipped surrogate of the policy's tokens, and -A log pi of the expert's, whose A >= 0."""
    own = base.clipped_loss(batch, settings)
    expert = (batch.extras[IMITATED] > 0) & (batch.advantages > 0)
    slopes = -batch.advantages
    log_prob = batch.old_log_prob + batch.log_ratio
    return TokenLoss(
        torch.where(expert, slopes * log_prob, own.values), torch.where(expert, slopes, own.slopes)
    )


def _check(config: Mapping[str, Any]) -> None:
    """Refuse fewer responses than leave two to compare."""
    n = config["actor_rollout_ref"]["rollout"]["n"]
    # With one response there is no group to begin with, which is checked elsewhere.
    if n == 2:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n = {n}: adv_estimator = 'ahpo' makes one of them the "
            "expert's, and two must remain to be compared; must be at least 3"
        )


ALGORITHMS = (
    base.Algorithm(
        "ahpo",
        ("2510.08540",),
        f"{base.CLIP}, and -log pi of an expert's answer where fewer than R responses succeed",
        base.SEQ_MEAN_TOKEN_MEAN,
        base.Estimator(
            "ahpo",
            advantages_with_expert,
            HybridSettings,
            section="ahpo",
            needs=("opening",),
            gives=(IMITATED,),
            check=_check,
            openings=openings,
        ),
        base.Loss(
            "ahpo",
            hybrid_loss,
            aggregations=(base.SEQ_MEAN_TOKEN_MEAN,),
            clips=True,
            dual_clips=True,
            proportional=True,
            token_fields={IMITATED: None},
        ),
    ),
)
