"""Adaptive reasoning by token-level entropy shaping, ARES (arXiv 2510.08457); its AEPO stage.

    window at t: mean of H over w tokens from t; high where it exceeds tau
    tau     = mean over responses of the quantile 0.95 of their tokens' entropies
    N_i     = number of high windows of response i
    d       = easy, medium or hard: at least 2/3, at least 1/3, or less of the group succeeds
    lambda_d = max(0, (mean N - target_d) / (var N + eps)), over the responses of the batch in d
    g_d(D)  = max(0, D) easy,  |D| medium,  max(0, -D) hard;   D = N_i - target_d
    R_i     = reward - 1(failure) min(limit, lambda_d g_d(N_i - target_d))
    KL term of a token: kl_loss_coef beta_d rho_t KL_t,   rho_t = rho < 1 in a high window, else 1

Advantages are GRPO's of R_i, the loss PPO's clip. H is the entropy of the policy that sampled.

The paper's target_d is the batch's own mean of N, with which lambda_d is 0: here it is a moving
average of the steps before, kept in checkpoints; a bucket that is seen for the first time has
no penalty. lambda_d is as printed: where failures of the hard bucket explore too little, it acts
only while the batch explores more than before.

Sources: a note on the paper for all equations; the public code (shawn0728/ARES) for w = 4, clip
0.2 / 0.3, KL 0.01 and `low_var_kl`. Decided here: eps, the limit (the code's first cap, 0.5, since
1 / var is unbounded), the decay 0.9, beta_d 1 and rho 0.5 (not found); a penalty of the sum over
the outputs of a session; groups of failures alone learn from their N.

Left out: branches at high windows during the rollout (verl cannot branch within a response); the
code's own shaping by Huber's and sigmoid functions, its word list of windows' first tokens, its
moving tau (`threshold_decay` = 0.99) and its beta_d controlled by the KL of each bucket; its
filter of groups without a spread, for which `algorithm.filter_groups` exists. Its cut of the KL
term for failures on easy prompts reads a column that its actor never gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_integer, require_number
from hpo_verl.core.windows import high_windows, row_quantiles
from hpo_verl.errors import ConfigError

PATH = "algorithm.ares"
KL_WEIGHT = "kl_weight"
"""The field beta_d rho_t."""

BUCKETS = ("easy", "medium", "hard")
EASY, MEDIUM = 2 / 3, 1 / 3


@dataclass(frozen=True)
class ARESSettings:
    """Settings of ARES, under `algorithm.ares`.

    Attributes:
        window: Tokens w of a window, at least 1.
        quantile: Of a response's entropies, in [0, 1].
        threshold_decay: Share of the last tau in the new one, in [0, 1); 0 is the batch's own.
        target_decay: Share of the last target in the new one, in [0, 1).
        epsilon: Added to the variance, above 0.
        penalty_limit: Largest penalty of a failure, at least 0.
        success_reward: Smallest reward of a success.
        kl_easy: beta_d of easy prompts, at least 0.
        kl_medium: The same of medium ones.
        kl_hard: The same of hard ones.
        kl_window: rho, in [0, 1]; 1 leaves the KL term of high windows as it is.
    """

    window: int = 4
    quantile: float = 0.95
    threshold_decay: float = 0.0
    target_decay: float = 0.9
    epsilon: float = 1e-6
    penalty_limit: float = 0.5
    success_reward: float = 1.0
    kl_easy: float = 1.0
    kl_medium: float = 1.0
    kl_hard: float = 1.0
    kl_window: float = 0.5

    def __post_init__(self) -> None:
        require_integer(f"{PATH}.window", self.window, 1)
        for name in ("quantile", "threshold_decay", "target_decay", "kl_window"):
            require_number(f"{PATH}.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("threshold_decay", "target_decay"):
            if getattr(self, name) == 1:
                raise ConfigError(f"{PATH}.{name} = 1: must be below 1, or nothing new counts")
        require_number(f"{PATH}.epsilon", self.epsilon, 0.0, open_low=True)
        require_number(f"{PATH}.success_reward", self.success_reward, float("-inf"))
        for name in ("penalty_limit", *(f"kl_{bucket}" for bucket in BUCKETS)):
            require_number(f"{PATH}.{name}", getattr(self, name), 0.0)


def difficulty(rollout: base.Rollout, success: torch.Tensor) -> torch.Tensor:
    """Bucket of every response's prompt, an index of `BUCKETS`, `[batch]` int64."""
    codes = rollout.groups
    zeros = torch.zeros(int(codes.max()) + 1 if len(codes) else 0, dtype=torch.float64)
    zeros = zeros.to(codes.device)
    count = zeros.index_add(0, codes, rollout.live.double())
    share = zeros.index_add(0, codes, success.double()) / count.clamp(min=1)
    return ((share < EASY).long() + (share < MEDIUM).long()).index_select(0, codes)


def shaped_advantages(rollout: base.Rollout, settings: ARESSettings) -> base.Advantages:
    """GRPO's advantages of the shaped rewards, and the weights of the KL term.

    Returns:
        `[batch]` float64; threshold and targets, for the next step; and beta_d rho_t.
    """
    memory, kept = rollout.extras["memory"], dict[str, float]()
    mask, entropy = rollout.mask, rollout.extras["entropy"]
    quantiles = row_quantiles(entropy, mask, settings.quantile)
    threshold = float(quantiles.double().mean()) if len(quantiles) else 0.0
    if (last := memory.get("ares_threshold")) is not None:
        decay = settings.threshold_decay if len(quantiles) else 1.0
        threshold = decay * last + (1.0 - decay) * threshold
    kept["ares_threshold"] = threshold
    begins, inside = high_windows(entropy, mask, settings.window, threshold)
    windows = rollout.per_session(begins.sum(dim=-1))

    success = rollout.live & (rollout.rewards >= settings.success_reward)
    failure = rollout.live & ~success
    buckets = difficulty(rollout, success)
    penalty = torch.zeros_like(windows)
    shares: dict[str, float] = {}
    for index, bucket in enumerate(BUCKETS):
        members = rollout.live & (buckets == index)
        size = float(members.sum())
        shares[f"ares_{bucket}_fraction"] = size / max(float(rollout.live.sum()), 1.0)
        if not size:
            continue
        key, mean = f"ares_target_{bucket}", float(windows[members].mean())
        target = memory.get(key)
        if target is None:
            kept[key] = mean
            continue
        kept[key] = settings.target_decay * target + (1.0 - settings.target_decay) * mean
        variance = float(windows[members].var(correction=0))
        multiplier = max(0.0, (mean - target) / (variance + settings.epsilon))
        beyond = windows - target
        directed = (beyond.clamp(min=0.0), beyond.abs(), (-beyond).clamp(min=0.0))[index]
        shaped = (multiplier * directed).clamp(max=settings.penalty_limit)
        penalty = torch.where(members & failure, shaped, penalty)

    rewards = rollout.rewards.double() - penalty
    of_bucket = torch.tensor(
        [settings.kl_easy, settings.kl_medium, settings.kl_hard],
        dtype=torch.float64,
        device=mask.device,
    )[buckets].unsqueeze(-1)
    relaxed = torch.where(inside, settings.kl_window, 1.0)
    live = max(float(rollout.live.sum()), 1.0)
    return base.Advantages(
        rollout._replace(rewards=rewards).grouped().advantages,
        statistics={
            "ares_threshold": threshold,
            "ares_windows": float(windows[rollout.live].sum()) / live,
            "ares_penalty": float(penalty.sum()) / live,
            **shares,
        },
        memory=kept,
        token_fields={KL_WEIGHT: (of_bucket * relaxed).masked_fill(~mask, 0.0)},
    )


ALGORITHMS = (
    base.Algorithm(
        "ares",
        ("2510.08457",),
        f"{base.CLIP}, rewards and KL terms by windows of high entropy",
        base.TOKEN_MEAN,
        base.Estimator(
            "ares",
            shaped_advantages,
            ARESSettings,
            section="ares",
            needs=("entropy", "memory"),
            gives=(KL_WEIGHT,),
            check=base.refuse_kl_in_reward,
        ),
        base.Loss(
            "ares",
            base.clipped_loss,
            aggregations=(base.TOKEN_MEAN, base.SEQ_MEAN_TOKEN_MEAN),
            clips=True,
            dual_clips=True,
            proportional=True,
            token_fields={KL_WEIGHT: None},
            kl_weight=KL_WEIGHT,
        ),
    ),
)
