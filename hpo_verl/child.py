"""Starts a module of this package in a process of its own."""

from __future__ import annotations

# `python -m` looks for every module in the working folder first, so that a types.py or torch.py
# of the user's would run; `-P`, which says not to, exists from Python 3.11 only.
_PROGRAM = (
    "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_arguments(module: str) -> list[str]:
    """Python's arguments for `-m module` that import nothing from the working folder."""
    return ["-c", _PROGRAM, module]
