"""Settings of the rollout `hf`, in verl's own place for those of a rollout's engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpo_verl.core.settings import parse_settings, require_flag

KEY = "actor_rollout_ref.rollout.engine_kwargs.hf"


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
    """Read the settings of a rollout's section."""
    return parse_settings(HFSettings, (rollout.get("engine_kwargs") or {}).get("hf"), KEY)
