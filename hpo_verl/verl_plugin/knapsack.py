"""How many responses a prompt gets: Knapsack RL (arXiv 2509.25849).

    max over N of sum_i (1 - p_i^N_i - (1 - p_i)^N_i) p_i (1 - p_i)^2
    with sum_i N_i = prompts * rollout.n,  low <= N_i <= high

A step has as many responses as without it; they go where right and wrong ones are to be expected
(`core.allocation`). p is the success rate of a prompt's responses the last time.

From the paper: value, limits 2 and 128, p of the epoch before, `rollout.n` each in the first epoch,
`low` where p is 1, what is left where p is 0. There by dynamic programming; the value is concave in
N, so a greedy choice is exact. Decided here: success is a reward above 0; a prompt that was not
seen yet gets `rollout.n` in later steps too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpo_verl.core.settings import parse_settings, require_flag, require_integer
from hpo_verl.errors import ConfigError

SECTION = "actor_rollout_ref.rollout.custom.knapsack"
COLUMN = "__rollout_n__"
"""verl 0.9.1's agent loops give a prompt with this column as many responses as it says."""


@dataclass(frozen=True)
class KnapsackSettings:
    """The section `actor_rollout_ref.rollout.custom.knapsack`.

    Attributes:
        enable: Whether responses are dealt by value; otherwise each prompt gets `rollout.n`.
        low: Smallest number of responses of a prompt, at least 2.
        high: Largest, at least `low`.
    """

    enable: bool = False
    low: int = 2
    high: int = 128

    def __post_init__(self) -> None:
        require_flag(f"{SECTION}.enable", self.enable)
        require_integer(f"{SECTION}.low", self.low, 2)
        require_integer(f"{SECTION}.high", self.high, self.low)


def knapsack_settings(config: Mapping[str, Any]) -> KnapsackSettings:
    """Read the section in verl's whole configuration; a bad value raises a ConfigError."""
    custom = config["actor_rollout_ref"]["rollout"].get("custom") or {}
    return parse_settings(KnapsackSettings, custom.get("knapsack"), SECTION)


def check_knapsack(config: Mapping[str, Any]) -> None:
    """Refuse, by a ConfigError, what makes another number of responses of a step."""
    settings = knapsack_settings(config)
    if not settings.enable:
        return
    who, n = f"{SECTION}.enable = True", config["actor_rollout_ref"]["rollout"]["n"]
    v1 = config["trainer"]["v1"]
    if (mode := v1["trainer_mode"]) != "hpo_sync":
        # In the others, a step's prompts are not those that were submitted together.
        raise ConfigError(f"trainer.v1.trainer_mode = {mode!r}: {who} needs hpo_sync")
    if not settings.low <= n <= settings.high:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n = {n!r}: {who} permits {settings.low} (low) to "
            f"{settings.high} (high)"
        )
    filters = config["algorithm"].get("filter_groups") or {}
    refills = (v1.get("sampler") or {}).get("sync_refill_failed_groups", False)
    for key, given in (
        ("algorithm.filter_groups.enable", filters.get("enable", False)),
        ("trainer.v1.sampler.sync_refill_failed_groups", refills),
    ):
        if given:
            raise ConfigError(f"{key} = True: must be false with {who}, since it replaces groups")
