"""Guided rollouts: GHPO (arXiv 2507.10628), for groups of which no response succeeds.

    prompt + text + first w of the reference solution's letters,   w = 25 %, then 50 %, then 75 %

Where all rewards of a group are at most 0, its prompt is asked again with a beginning of the
reference solution, and again with more of it until a response succeeds. The last group asked for
takes the first one's place: its responses are trained on after the prompt with the hint.

From the paper and its public code: the test, the shares, the words in front of a hint, and that a
share counts letters (rounded). The public code gives hints from the first step, the paper after
about twenty (`after_step`). Its code, when a later hint is given to any group, puts plain prompts
back in front of responses that an earlier hint had helped; not so here. Decided here: a group whose
prompt with the hint would be longer than `data.max_prompt_length`, or which has no reference
solution, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo_verl.core.settings import parse_settings, require_flag, require_number
from hpo_verl.errors import ConfigError, DataError

SECTION = "actor_rollout_ref.rollout.custom.hints"
TEXT = (
    "\n The following text is the beginning part of the answer, which you can refer to for "
    "solving the problem:\n"
)
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class HintSettings:
    """The section `actor_rollout_ref.rollout.custom.hints`.

    Attributes:
        enable: Whether groups that fail whole are asked again.
        by: Name of the reference solution, a text in `extra_info`.
        shares: Shares of its letters, rising, above 0 and below 1.
        text: What stands between prompt and hint.
        after_step: Steps at the beginning without hints.
    """

    enable: bool = False
    by: str = "solution"
    shares: Sequence[float] = (0.25, 0.5, 0.75)
    text: str = TEXT
    after_step: int = 0

    def __post_init__(self) -> None:
        require_flag(f"{SECTION}.enable", self.enable)
        for name in ("by", "text"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{SECTION}.{name} = {value!r}: must be a text")
        shares = [] if isinstance(self.shares, str) else list(self.shares)
        for share in shares:
            require_number(f"{SECTION}.shares", share, 0.0, 1.0, open_low=True)
        if not shares or shares != sorted(set(shares)) or shares[-1] == 1.0:
            raise ConfigError(f"{SECTION}.shares = {self.shares!r}: must rise, and end below 1")
        require_number(f"{SECTION}.after_step", self.after_step, 0)


def hint_settings(config: Mapping[str, Any]) -> HintSettings:
    """Read the section in verl's whole configuration; a bad value raises a ConfigError."""
    custom = config["actor_rollout_ref"]["rollout"].get("custom") or {}
    return parse_settings(HintSettings, custom.get("hints"), SECTION)


def reference(extra_info: Any, by: str) -> str:
    """The reference solution of a row; empty without one."""
    found = (extra_info or {}).get(by)
    return found if isinstance(found, str) else ""


def hinted(messages: Messages, solution: str, share: float, text: str) -> Messages | None:
    """A prompt with a beginning of the solution at its end; None where there is nothing to add."""
    hint, last = solution[: round(len(solution) * share)], messages[-1]
    if not hint or not isinstance(last["content"], str):
        return None
    return [*messages[:-1], {**last, "content": last["content"] + text + hint}]


def check_hints(config: Mapping[str, Any]) -> None:
    """Refuse, by a ConfigError, what does not go with asking again."""
    if not hint_settings(config).enable:
        return
    who, v1 = f"{SECTION}.enable = True", config["trainer"]["v1"]
    if (mode := v1["trainer_mode"]) != "hpo_sync":
        # In the others, responses are sampled long before a step looks at them.
        raise ConfigError(f"trainer.v1.trainer_mode = {mode!r}: {who} needs hpo_sync")
    reward, algorithm = config["reward"]["reward_model"], config["algorithm"]
    custom = config["actor_rollout_ref"]["rollout"].get("custom") or {}
    for key, given in (
        ("algorithm.filter_groups.enable", (algorithm.get("filter_groups") or {}).get("enable")),
        (
            "trainer.v1.sampler.sync_refill_failed_groups",
            (v1.get("sampler") or {}).get("sync_refill_failed_groups"),
        ),
        # Its rewards come after sampling.
        (
            "reward.reward_model.enable",
            reward.get("enable") and not reward.get("enable_resource_pool"),
        ),
        (
            "actor_rollout_ref.rollout.custom.knapsack.enable",
            (custom.get("knapsack") or {}).get("enable"),
        ),
    ):
        if given:
            raise ConfigError(f"{key} = True: must be false with {who}")
    if (n := config["actor_rollout_ref"]["rollout"]["n"]) < 2:
        raise ConfigError(f"actor_rollout_ref.rollout.n = {n!r}: must be at least 2 with {who}")


def require_reference(rows: Sequence[Mapping[str, Any]], by: str) -> int:
    """How many rows have a reference solution; a DataError where none has one."""
    found = sum(bool(reference(row.get("extra_info"), by)) for row in rows)
    if not found:
        raise DataError(f"{SECTION}.by = {by!r}: no sampled row has a text extra_info.{by}")
    return found
