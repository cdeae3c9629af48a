"""Folders that the environment names, and that recipes read from it."""

from __future__ import annotations

import os

from hpo_verl.errors import ConfigError

FOLDERS = ("HPO_VERL_CACHE", "HPO_VERL_CHECKPOINTS")


def complete_environment() -> None:
    """Give folders in the environment the form that every process of a run understands."""
    os.environ.setdefault("HOME", os.path.expanduser("~"))
    for name in FOLDERS:
        folder = os.environ.pop(name, "")
        if "${" in folder:
            raise ConfigError(f"{name}={folder}: must name a folder, without ${{ in its path")
        expanded = os.path.expanduser(folder)
        if expanded.startswith("~"):
            raise ConfigError(f"{name}={folder}: there is no such user")
        if folder:
            os.environ[name] = os.path.abspath(expanded)
