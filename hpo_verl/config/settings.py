"""What is read from a composed configuration in several places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MODEL = "actor_rollout_ref.model"
POLICY_KEY = f"{MODEL}.path"


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested dictionaries and lists."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from leaves(value, f"{prefix}.{index}")
    else:
        yield prefix, node


def data_files(config: DictConfig) -> Iterator[tuple[str, Path]]:
    """Key and path of every data file that a configuration names."""
    for key in ("data.train_files", "data.val_files"):
        value = OmegaConf.select(config, key)
        for path in value if isinstance(value, list | ListConfig) else [value]:
            if path is not None:
                yield key, Path(str(path)).expanduser()


def policy_folder(config: DictConfig) -> Path:
    """Where the policy's files are, or will be."""
    return Path(str(OmegaConf.select(config, POLICY_KEY))).expanduser()


def cards_a_copy(config: DictConfig) -> int:
    """Cards over which FSDP shards one copy of weights, gradients and moments."""
    cards = config.trainer.nnodes * config.trainer.n_gpus_per_node
    size = OmegaConf.select(config, "actor_rollout_ref.actor.fsdp_config.fsdp_size") or -1
    return cards if size < 1 else min(size, cards)
