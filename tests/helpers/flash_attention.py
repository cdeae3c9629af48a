"""Puts the stand-in for flash-attn (`flash_attn_cpu`) where processes of a test find it."""

import os
from collections.abc import Mapping
from pathlib import Path

STAND_IN = Path(__file__).with_name("flash_attn_cpu")


def with_flash_attention(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which verl and transformers find flash-attn, and take it on the CPU."""
    paths = filter(None, (str(STAND_IN), environment.get("PYTHONPATH")))
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(paths),
        "VERL_USE_EXTERNAL_MODULES": "flash_attn_on_cpu",
    }
