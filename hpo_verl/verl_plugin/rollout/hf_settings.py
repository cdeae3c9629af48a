"""Settings of the rollout `hf`, in verl's own place for those of a rollout's engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpo_verl.core.settings import parse_settings, require_flag
from hpo_verl.errors import ConfigError

KEY = "actor_rollout_ref.rollout.engine_kwargs.hf"
DTYPES = ("float32", "bfloat16")
"""What `rollout.dtype` may be; logits are made float32 before a token is drawn."""


@dataclass(frozen=True)
class HFSettings:
    """Settings under `KEY`; a bad one raises a ConfigError.

    Args:
        repeatable: Whether a response depends on the weights, its own prompt and its own seed
            alone, bit for bit. Without that, forward passes hold no empty rows.
    """

    repeatable: bool = True

    def __post_init__(self) -> None:
        require_flag(f"{KEY}.repeatable", self.repeatable)


def hf_settings(rollout: Any) -> HFSettings:
    """Read the settings of a rollout's section, and check its `dtype` where it is `hf`."""
    if rollout["name"] == "hf" and rollout["dtype"] not in DTYPES:
        raise ConfigError(
            f"actor_rollout_ref.rollout.dtype = {rollout['dtype']!r}: the rollout hf computes in "
            + " or ".join(DTYPES)
        )
    return parse_settings(HFSettings, (rollout.get("engine_kwargs") or {}).get("hf"), KEY)
