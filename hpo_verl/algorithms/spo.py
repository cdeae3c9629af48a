"""Single-stream policy optimization, SPO (arXiv 2509.13232).

    A_i   = whiten(r_i - v(x_i)),   v = alpha / (alpha + beta)       one response a prompt
    alpha <- rho alpha + r_i,       beta <- rho beta + (1 - r_i)     after the advantage is taken
    rho   = clip(2^(-D / D_half), rho_min, rho_max)
    D     = mean_t |log pi(y_t) - log pi_last(y_t)|                  on x's last response y
    P(x)  ~ sqrt(v(x) (1 - v(x))) + exploration                      which prompts come next

The baseline of a prompt is its own running success rate, a Beta distribution's
mean. Its memory is 1 / (1 - rho) responses and shortens with the distance D
that the policy has moved since it last answered the prompt. Advantages are
whitened over all responses of the batch.

From the paper and its public code: everything above, the defaults, the first
counts from offline samples. Decided here: a prompt without such samples starts
with alpha = beta = 0.5 (as the public code does); its first visit counts as
D = 0; D is measured before the step's update (the public code: after it);
prompts are drawn from the whole data set (the public code draws from a slice of
an epoch).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpo_verl.algorithms import base
from hpo_verl.core.groups import group_relative_advantages
from hpo_verl.core.settings import parse_settings, require_flag, require_number
from hpo_verl.errors import ConfigError, DataError

LARGEST_RHO_MIN = 0.999
"""Offline samples weigh as much as 1 / (1 - rho_min) responses; here a thousand."""


@dataclass(frozen=True)
class SPOSettings:
    """Settings of SPO, under `algorithm.spo`.

    Attributes:
        rho_min: Smallest factor on the counts at an update, in [0, 0.999].
        rho_max: Largest, in [rho_min, 1]. Equal to rho_min: constant forgetting, and no
            extra pass over last responses.
        drift_half: D_half, the distance at which the factor is a half, nats, above 0.
        exploration: Sampling weight that every prompt has anyway, above 0.
        prioritized: Whether prompts are drawn by weight; otherwise all alike.
        initial_rewards: JSON file with a list of offline rewards in [0, 1] for each prompt of
            the training set, in its order; None without offline samples.
    """

    rho_min: float = 0.875
    rho_max: float = 0.96
    drift_half: float = 0.06
    exploration: float = 0.05
    prioritized: bool = True
    initial_rewards: str | None = None

    def __post_init__(self) -> None:
        path = "algorithm.spo"
        require_number(f"{path}.rho_min", self.rho_min, 0.0, LARGEST_RHO_MIN)
        require_number(f"{path}.rho_max", self.rho_max, self.rho_min, 1.0)
        require_number(f"{path}.drift_half", self.drift_half, 0.0, open_low=True)
        require_number(f"{path}.exploration", self.exploration, 0.0, open_low=True)
        require_flag(f"{path}.prioritized", self.prioritized)
        if self.initial_rewards is not None and not isinstance(self.initial_rewards, str):
            raise ConfigError(
                f"{path}.initial_rewards = {self.initial_rewards!r}: must be a path or null"
            )

    def forgetting(self, drift: torch.Tensor) -> torch.Tensor:
        """Factor rho on the counts of every prompt, `[prompts]` float64, from D, nats."""
        return torch.exp2(-drift.double() / self.drift_half).clamp(self.rho_min, self.rho_max)


def single_stream_advantages(rollout: base.Rollout, settings: SPOSettings) -> base.Advantages:
    """Reward above the prompt's own success rate, whitened over the batch.

    Returns:
        `[batch]` float64; exactly 0 where all differences are equal.

    Raises:
        DataError: A live reward is outside [0, 1].
    """
    rewards, live = rollout.rewards, rollout.live
    outside = live & ((rewards < 0.0) | (rewards > 1.0))
    if bool(outside.any()):
        raise DataError(
            f"spo: reward {rewards[outside][0].item():g} of response "
            f"{int(outside.nonzero()[0])}: must be in [0, 1]"
        )
    difference = rewards.double() - rollout.extras["values"].double()
    one_group = torch.zeros_like(rollout.groups)
    return base.Advantages(group_relative_advantages(difference, one_group, live).advantages)


class ValueTracker:
    """Success rate of every prompt, as counts of a Beta distribution; a `base.PromptHistory`.

    `alpha` weighs successes and `beta` failures, `[prompts]` float64.

    Raises:
        DataError: The offline rewards cannot be read, or are of another number of prompts.
    """

    def __init__(self, prompts: int, settings: SPOSettings) -> None:
        self.settings = settings
        self.alpha = torch.full((prompts,), 0.5, dtype=torch.float64)
        self.beta = self.alpha.clone()
        if (initial_rewards := read_initial_rewards(settings)) is not None:
            self.start_from(initial_rewards)

    def start_from(self, initial_rewards: Sequence[Sequence[float]]) -> None:
        """Make the first counts of a prompt from its n offline rewards r, where there are any.

        alpha0 = N0 (sum r + 0.5) / (n + 1),   beta0 = N0 - alpha0,   N0 = 1 / (1 - rho_min)
        """
        if len(initial_rewards) != len(self.alpha):
            raise DataError(
                f"initial_rewards: {len(initial_rewards)} lists for {len(self.alpha)} prompts"
            )
        weight = 1.0 / (1.0 - self.settings.rho_min)
        for row, rewards in enumerate(initial_rewards):
            if rewards:
                self.alpha[row] = weight * (sum(rewards) + 0.5) / (len(rewards) + 1)
                self.beta[row] = weight - self.alpha[row]

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def measures_drift(self) -> bool:
        """Whether the factor on the counts depends on the policy's drift."""
        return self.settings.rho_min < self.settings.rho_max

    def values(self) -> torch.Tensor:
        """Success rate of every prompt, `[prompts]` float64, in (0, 1)."""
        return self.alpha / (self.alpha + self.beta)

    def sampling_weights(self) -> torch.Tensor:
        """How much every prompt is drawn, `[prompts]` float64, not normalised."""
        if not self.settings.prioritized:
            return torch.ones_like(self.alpha)
        values = self.values()
        return (values * (1.0 - values)).sqrt() + self.settings.exploration

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Draw prompts by weight, without replacement; at most as many as there are."""
        return torch.multinomial(self.sampling_weights(), count, generator=generator).tolist()

    def update(self, prompts: torch.Tensor, rewards: torch.Tensor, rho: torch.Tensor) -> None:
        """Forget by the factor rho, `[batch]`, and count a response of each prompt."""
        rewards, rho = rewards.double(), rho.double()
        self.alpha[prompts] = rho * self.alpha[prompts] + rewards
        self.beta[prompts] = rho * self.beta[prompts] + (1.0 - rewards)

    def learn(
        self, prompts: torch.Tensor, rewards: torch.Tensor, drift: torch.Tensor, revisited: int
    ) -> dict[str, float]:
        """Count a step's responses; see `base.PromptHistory.learn`."""
        values, rho = self.values()[prompts], self.settings.forgetting(drift)
        self.update(prompts, rewards, rho)
        count = max(len(prompts), 1)
        statistics = {
            "spo_value": float(values.sum()) / count,
            "spo_forgetting": float(rho.sum()) / count,
        }
        if self.measures_drift:
            statistics["spo_drift"] = float(drift.sum()) / count
            statistics["spo_revisited_fraction"] = revisited / count
        return statistics

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Counts, to go on from."""
        return {"alpha": self.alpha.clone(), "beta": self.beta.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over counts; raises DataError if they are of another number of prompts."""
        if len(state["alpha"]) != len(self):
            raise DataError(
                f"checkpoint of algorithm.spo: {len(state['alpha'])} prompts, but the training "
                f"set has {len(self)}"
            )
        self.alpha, self.beta = state["alpha"].clone(), state["beta"].clone()


def read_initial_rewards(settings: SPOSettings) -> list[list[float]] | None:
    """Read the file of offline rewards, a list for every prompt; None without a file.

    Raises:
        DataError: Names the key, the file and what is wrong.
    """
    if settings.initial_rewards is None:
        return None
    where = f"algorithm.spo.initial_rewards: {settings.initial_rewards}"
    try:
        rows = json.loads(Path(settings.initial_rewards).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{where} cannot be read as JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{where} must hold a list of lists of numbers in [0, 1]")
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not all(
            type(reward) in (int, float) and 0.0 <= reward <= 1.0 for reward in row
        ):
            raise DataError(f"{where}: entry {number} must be a list of numbers in [0, 1]")
    return rows


def _check(config: Mapping[str, Any]) -> None:
    """Refuse several responses a prompt, rewards outside [0, 1], and a bad file of rewards."""
    algorithm = config["algorithm"]
    read_initial_rewards(parse_settings(SPOSettings, algorithm.get("spo"), "algorithm.spo"))
    responses = config["actor_rollout_ref"]["rollout"]["n"]
    if responses != 1:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n = {responses!r}: algorithm.adv_estimator = 'spo' takes "
            "one response per prompt; must be 1"
        )
    base.refuse_kl_in_reward(config)


ALGORITHMS = (
    base.Algorithm(
        "spo",
        ("2509.13232",),
        f"{base.CLIP}, A = whiten(r - v(prompt)), one response a prompt",
        base.TOKEN_MEAN,
        base.Estimator(
            "spo",
            single_stream_advantages,
            SPOSettings,
            section="spo",
            needs=("values",),
            check=_check,
            history=ValueTracker,
        ),
    ),
)
