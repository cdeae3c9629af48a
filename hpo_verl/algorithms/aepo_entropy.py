"""Arbitrary entropy policy optimization, AEPO (arXiv 2510.08141; SCOPE-RL in later versions).

    J = J_GRPO + alpha E_{o ~ pi_old^T} [1(R = 1) (1/|o|) sum_t min(r_t, clip(r_t, 1 - e, 1 + e))]
    T = clip(1 + H0 - H, T_low, T_high)

H is the mean entropy of the tokens of the last step, nats, H0 the one that is to be kept. Where
the policy has less, successes sampled at a temperature above 1 draw it up, and below 1 down:
REINFORCE on other samples instead of an entropy bonus.

Of a prompt's n responses the first `responses` are sampled at T times the run's temperature. They
belong to no group: a success has A = alpha N / N_T, a failure 0, and GRPO's advantages among the
others are multiplied by N / N_GRPO, where N, N_T and N_GRPO count the batch's responses. So the
mean over the batch (`seq-mean-token-mean`) is the objective exactly. Ratios are those to pi_old at
the run's temperature, not to pi_old^T, as in the equation.

Sources: a note on the paper's latest version for the equation, alpha = 1/64, H0 = 0.5 and
[0.8, 1.2]; the public code (597358816/AEPO) of the first one, where T is T_high for H below H0 and
T_low above (`schedule: switch`). That code samples a quarter of the prompts once more, takes up to
60 successes in the place of as many rows, half as many above H0, and measures H as -log pi; here
no response is sampled beyond n, and all successes count. Decided here: T = 1 at the first step,
which has no H; H is that of the responses sampled at 1; one response of each prompt is at T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpo_verl.algorithms import base
from hpo_verl.core.settings import require_choice, require_integer, require_number
from hpo_verl.errors import ConfigError

PATH = "algorithm.aepo_entropy"
MEASURED = "aepo_entropy_measured"


@dataclass(frozen=True)
class AEPOEntropySettings:
    """Settings of the entropy control, under `algorithm.aepo_entropy`.

    Attributes:
        target: Entropy H0, nats per token, at least 0.
        responses: How many of a prompt's responses are sampled at T, at least 1; at least two
            others must remain.
        weight: alpha, at least 0.
        schedule: `linear`: T = 1 + H0 - H between its limits; `switch`: one of its limits.
        temperature_low: Smallest T, in (0, 1].
        temperature_high: Largest T, at least 1.
        success_reward: Smallest reward of a success.
    """

    target: float = 0.5
    responses: int = 1
    weight: float = 0.015625
    schedule: str = "linear"
    temperature_low: float = 0.8
    temperature_high: float = 1.2
    success_reward: float = 1.0

    def __post_init__(self) -> None:
        require_number(f"{PATH}.target", self.target, 0.0)
        require_integer(f"{PATH}.responses", self.responses, 1)
        require_number(f"{PATH}.weight", self.weight, 0.0)
        require_choice(f"{PATH}.schedule", self.schedule, ("linear", "switch"))
        require_number(f"{PATH}.temperature_low", self.temperature_low, 0.0, 1.0, open_low=True)
        require_number(f"{PATH}.temperature_high", self.temperature_high, 1.0)
        require_number(f"{PATH}.success_reward", self.success_reward, float("-inf"))

    def temperature(self, memory: Mapping[str, float]) -> float:
        """T after a step."""
        measured = memory.get(MEASURED)
        if measured is None:
            return 1.0
        if self.schedule == "switch":
            return self.temperature_high if measured <= self.target else self.temperature_low
        wanted = 1.0 + self.target - measured
        return min(max(wanted, self.temperature_low), self.temperature_high)


def temperatures(memory: Mapping[str, float], settings: AEPOEntropySettings) -> list[float]:
    """Factors on the temperature of a prompt's first responses."""
    return [settings.temperature(memory)] * settings.responses


def advantages_with_successes(
    rollout: base.Rollout, settings: AEPOEntropySettings
) -> base.Advantages:
    """GRPO's advantages of the responses sampled at 1, and REINFORCE's of the others.

    Returns:
        `[batch]` float64; and the entropy of the former, for the next temperature.
    """
    memory, live = rollout.extras["memory"], rollout.live
    tempered = live.new_zeros(live.shape)
    if rollout.session is not None:
        tempered = rollout.session < settings.responses
    of_group, others = live & ~tempered, live & tempered
    scores = rollout.rewards if rollout.scores is None else rollout.scores
    successes = others & (scores >= settings.success_reward)
    total = float(live.sum())
    advantages = rollout._replace(live=of_group).grouped().advantages
    advantages = advantages * (total / max(float(of_group.sum()), 1.0))
    reinforced = settings.weight * total / max(float(others.sum()), 1.0)
    statistics = {
        "aepo_temperature": settings.temperature(memory),
        "aepo_tempered_success": float(successes.sum()) / max(float(others.sum()), 1.0),
    }
    kept, sampled = {}, rollout.mask & ~tempered.unsqueeze(-1)
    if bool(sampled.any()):
        kept = {MEASURED: float(rollout.extras["entropy"][sampled].double().mean())}
    return base.Advantages(
        advantages + successes.double() * reinforced, statistics=statistics, memory=kept
    )


def _check(config: Mapping[str, Any]) -> None:
    """Refuse as many responses at T as leave no group."""
    settings = config["algorithm"].get("aepo_entropy") or {}
    responses = settings.get("responses", AEPOEntropySettings.responses)
    n = config["actor_rollout_ref"]["rollout"]["n"]
    # With one response there is no group to begin with, which is checked elsewhere.
    if n > 1 and responses > n - 2:
        raise ConfigError(
            f"{PATH}.responses = {responses}: of actor_rollout_ref.rollout.n = {n} responses two "
            f"must remain to be compared; at most {n - 2}"
        )


ALGORITHMS = (
    base.Algorithm(
        "aepo_entropy",
        ("2510.08141",),
        f"{base.CLIP}, and A > 0 for successes sampled at a temperature by the entropy",
        base.SEQ_MEAN_TOKEN_MEAN,
        base.Estimator(
            "aepo_entropy",
            advantages_with_successes,
            AEPOEntropySettings,
            section="aepo_entropy",
            needs=("entropy", "memory"),
            check=_check,
            temperatures=temperatures,
        ),
    ),
)
