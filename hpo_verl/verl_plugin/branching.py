"""Settings of branching rollouts: AEPO, agentic (arXiv 2510.14545); see `core.branching`.

One of a prompt's `rollout.n` sessions is monitored first; m start from the root, it among them. The
others go on from places where sessions are to branch, those of the largest P_t first, each with a
copy of the conversation up to the tool's reply; the branches may branch again. Sessions for which
there is no such place start from the root.

From the paper: both equations, and that the number of branchings in a row lowers P_t in a line.
From the code of ARPO, which it builds on: alpha 0.5, gamma 0.2, and two ways from a place. Not
found, and decided here: beta 1; tau 0.5, so that the first branching needs a higher entropy than
the root's; a penalty of 0.25 for each branching in a row; entropies in nats, where ARPO divides by
the size of the vocabulary. The entropy is estimated by the mean -log p of the first `tokens` tokens
that were sampled, since verl's servers return no entropies: right on average, with the noise of a
sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpo_verl.core.branching import branch_value
from hpo_verl.core.settings import parse_settings, require_integer, require_number
from hpo_verl.errors import ConfigError

SECTION = "actor_rollout_ref.rollout.custom.branching"
NAME = "branching_tool_agent"
"""The agent loop that reads the section."""
RECORD = "branching"
"""What the loop leaves in `extra_fields` for the trainer."""


@dataclass(frozen=True)
class BranchingSettings:
    """The section `actor_rollout_ref.rollout.custom.branching`.

    Attributes:
        sensitivity: beta, at least 0.
        base: alpha.
        weight: gamma, at least 0.
        penalty: Of each branching in a row, 0 to 1.
        threshold: tau.
        width: Ways from a place, that of the session which came there among them, at least 2.
        tokens: Tokens of a turn that its entropy is taken of, at least 1; ARPO's 20.
    """

    sensitivity: float = 1.0
    base: float = 0.5
    weight: float = 0.2
    penalty: float = 0.25
    threshold: float = 0.5
    width: int = 2
    tokens: int = 20

    def __post_init__(self) -> None:
        for name, low, high in (
            ("sensitivity", 0.0, math.inf),
            ("base", -math.inf, math.inf),
            ("weight", 0.0, math.inf),
            ("penalty", 0.0, 1.0),
            ("threshold", -math.inf, math.inf),
        ):
            require_number(f"{SECTION}.{name}", getattr(self, name), low, high)
        require_integer(f"{SECTION}.width", self.width, 2)
        require_integer(f"{SECTION}.tokens", self.tokens, 1)

    def value(self, change: float, in_a_row: int) -> float:
        """P_t of a change of entropy, nats, after so many branchings in a row."""
        return branch_value(change, in_a_row, self.base, self.weight, self.penalty)


def branching_settings(rollout: Mapping[str, Any]) -> BranchingSettings:
    """Read the section in verl's section of the rollout; a bad value raises a ConfigError."""
    custom = rollout.get("custom") or {}
    return parse_settings(BranchingSettings, custom.get("branching"), SECTION)


def branches(rollout: Mapping[str, Any]) -> bool:
    """Whether verl's section of the rollout selects the agent loop whose sessions branch."""
    return (rollout.get("agent") or {}).get("default_agent_loop") == NAME


def check_branching(config: Mapping[str, Any]) -> None:
    """Refuse, by a ConfigError, what does not go with branching."""
    rollout = config["actor_rollout_ref"]["rollout"]
    branching_settings(rollout)
    if not branches(rollout):
        return
    who = f"actor_rollout_ref.rollout.agent.default_agent_loop = {NAME!r}"
    if not rollout.get("calculate_log_probs"):
        raise ConfigError(
            f"actor_rollout_ref.rollout.calculate_log_probs = "
            f"{rollout.get('calculate_log_probs')!r}: must be true with {who}"
        )
    if (n := rollout["val_kwargs"]["n"]) != 1:
        # A validation's responses would branch, too.
        raise ConfigError(f"actor_rollout_ref.rollout.val_kwargs.n = {n!r}: must be 1 with {who}")
