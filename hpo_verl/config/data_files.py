"""The data files that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf


def data_files(config: DictConfig) -> Iterator[tuple[str, Path]]:
    """Key and path of every data file that a configuration names."""
    for key in ("data.train_files", "data.val_files"):
        value = OmegaConf.select(config, key)
        for path in value if isinstance(value, list | ListConfig) else [value]:
            yield key, Path(str(path)).expanduser()
