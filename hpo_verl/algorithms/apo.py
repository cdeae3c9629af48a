"""Adaptive policy optimization, APO (A2FM, arXiv 2510.12838): modes forced by prefix, paid by need.

    G = rho modes + gamma responses to a prompt: rho begin with each mode's prefix, gamma are free
    R = reward r_adaptive
    r_adaptive = 1 - p^alpha for a free choice of another mode where p > tau, else 1

p is the success rate of the prompt's responses that were forced into the last mode, the cheap
one. A prompt with p > tau is easy: who chooses a dearer mode for it gets less, nothing where the
cheap one always succeeds. GRPO compares all G responses, with the rewards R. A forced prefix is
masked; one that a response chose by itself is trained.

Sources: a note on the paper, for G, rho = gamma = 3, alpha = 2, the masks and R as the product of
accuracy, r_adaptive and format; its public code (OPPO-PersonalAI) only infers. tau was not found.
The paper's modes are agentic, reasoning and instant, for a model that was trained on them.
Decided here: tau = 0.5; two modes, since the agentic one needs a loop with tools; their prefixes;
gamma is what n leaves; a free response that begins with no prefix has the format 0, so R = 0;
r_adaptive is 1 for forced responses, which choose nothing; one group of all G; `token-mean`.
Rewards are to lie in [0, 1], with the task's own format in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_integer, require_names, require_number
from hpo_verl.errors import ConfigError

PATH = "algorithm.apo"


@dataclass(frozen=True)
class APOSettings:
    """Settings of APO, under `algorithm.apo`.

    Attributes:
        modes: Prefix of each mode, two at least, none the beginning of another; the last is the
            cheap one.
        forced: rho, how many of a prompt's responses are forced into each mode, at least 1.
        alpha: Exponent of p, above 0.
        threshold: tau, in [0, 1].
        success_reward: Smallest reward of a success.
    """

    modes: Sequence[str] = ("<reasoning>\n", "<instant>\n")
    forced: int = 3
    alpha: float = 2.0
    threshold: float = 0.5
    success_reward: float = 1.0

    def __post_init__(self) -> None:
        modes = require_names(f"{PATH}.modes", self.modes)
        if len(modes) < 2 or any(a != b and a.startswith(b) for a in modes for b in modes):
            raise ConfigError(
                f"{PATH}.modes = {list(modes)!r}: must be two prefixes or more, none the "
                "beginning of another"
            )
        # Hydra's lists are not those that settings compare with.
        object.__setattr__(self, "modes", modes)
        require_integer(f"{PATH}.forced", self.forced, 1)
        require_number(f"{PATH}.alpha", self.alpha, 0.0, open_low=True)
        require_number(f"{PATH}.threshold", self.threshold, 0.0, 1.0)
        require_number(f"{PATH}.success_reward", self.success_reward, float("-inf"))


def openings(settings: APOSettings) -> list[base.Opening]:
    """The prefixes that a prompt's first responses are forced to begin with."""
    return [base.Opening(mode) for mode in settings.modes for _ in range(settings.forced)]


def adaptive_advantages(rollout: base.Rollout, settings: APOSettings) -> base.Advantages:
    """GRPO's advantages, `[batch]` float64, of the rewards R."""
    live, codes, mode = rollout.live, rollout.groups, rollout.extras["opening"]
    cheap = len(settings.modes) - 1
    forced = torch.zeros_like(live)
    if rollout.session is not None:
        forced = rollout.session < settings.forced * len(settings.modes)
    free, tried = live & ~forced, live & forced & (mode == cheap)
    success = tried & (rollout.rewards >= settings.success_reward)
    zeros = torch.zeros(int(codes.max()) + 1 if len(codes) else 0, dtype=torch.float64)
    zeros = zeros.to(live.device)
    count = zeros.index_add(0, codes, tried.double())
    p = zeros.index_add(0, codes, success.double()) / count.clamp(min=1)
    easy = p > settings.threshold

    dearer = free & (mode >= 0) & (mode != cheap) & easy.index_select(0, codes)
    factor = torch.where(dearer, 1.0 - p.index_select(0, codes) ** settings.alpha, 1.0)
    factor = factor.masked_fill(free & (mode < 0), 0.0)
    choices = max(float(free.sum()), 1.0)
    return base.Advantages(
        rollout.grouped_by(rollout.rewards.double() * factor),
        statistics={
            "apo_easy_fraction": float(easy.sum()) / max(float((count > 0).sum()), 1.0),
            "apo_cheap_success": float(success.sum()) / max(float(tried.sum()), 1.0),
            "apo_cheap_fraction": float((free & (mode == cheap)).sum()) / choices,
            "apo_no_mode_fraction": float((free & (mode < 0)).sum()) / choices,
            "apo_adaptive": float(factor[free].sum()) / choices,
        },
    )


def _check(config: Mapping[str, Any]) -> None:
    """Refuse a KL penalty in the rewards, and fewer responses than leave one free."""
    base.refuse_kl_in_reward(config)
    settings = config["algorithm"].get("apo") or {}
    modes = settings.get("modes", APOSettings.modes)
    needed = settings.get("forced", APOSettings.forced) * len(modes)
    n = config["actor_rollout_ref"]["rollout"]["n"]
    if 1 < n <= needed:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n = {n}: {PATH}.forced times {len(modes)} modes are "
            f"{needed}, and one response at least must be free; must be at least {needed + 1}"
        )


ALGORITHMS = (
    base.Algorithm(
        "apo",
        ("2510.12838",),
        f"{base.CLIP}, modes forced by prefix, rewards times 1 - p^alpha for dearer ones",
        base.TOKEN_MEAN,
        base.Estimator(
            "apo",
            adaptive_advantages,
            APOSettings,
            section="apo",
            needs=("opening",),
            check=_check,
            openings=openings,
        ),
    ),
)
