"""Folders that the environment names, and that recipes read from it."""

from __future__ import annotations

import os

FOLDERS = ("HPO_VERL_CACHE", "HPO_VERL_CHECKPOINTS")


def complete_environment() -> None:
    """Give folders in the environment the form that every process of a run understands."""
    os.environ.setdefault("HOME", os.path.expanduser("~"))
    for name in FOLDERS:
        folder = os.environ.pop(name, "")
        if folder:
            os.environ[name] = os.path.abspath(os.path.expanduser(folder))
