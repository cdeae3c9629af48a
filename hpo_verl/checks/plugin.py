"""Whether verl loads the plugin, in this process and in Ray's workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from hpo_verl.checks.finding import Finding, error, first_line, ok
from hpo_verl.runs.quiet import quiet_imports

PLUGIN = "hpo_verl.verl_plugin"
ENTRY_POINT = "hpo_verl"
POLICY_VARIABLE = "VERL_USE_EXTERNAL_PLUGINS"
MODULES_VARIABLE = "VERL_USE_EXTERNAL_MODULES"


def plugin_state() -> dict[str, Any]:
    """Import verl and tell what became of the plugin in this process.

    verl logs a plugin that fails to load at DEBUG only. So the plugin is not
    imported here by name before verl has had its chance to do it.

    Returns:
        Plain values: `installed` (the entry point is there), `permitted` (the
        environment lets verl load it), `loaded`, `absent` (registered names that
        are missing) and `failure` (text; empty without one).
    """
    points = [p for p in entry_points(group="verl.plugins") if p.value == PLUGIN]
    policy = os.environ.get(POLICY_VARIABLE, "auto").strip().lower()
    named = PLUGIN in os.environ.get(MODULES_VARIABLE, "").split(",")
    allowed = {name.strip() for name in policy.split(",")}
    state: dict[str, Any] = {
        "installed": bool(points) or named,
        "permitted": named or policy == "auto" or ENTRY_POINT in allowed,
        "policy": policy,
        "loaded": False,
        "absent": [],
        "failure": "",
    }
    try:
        with quiet_imports():
            import_module("verl")
            state["loaded"] = PLUGIN in sys.modules
            # Says why, where verl kept silent.
            import_module(PLUGIN)
            state["absent"] = import_module(f"{PLUGIN}.registered").absent_names()
    except Exception as problem:
        state["failure"] = f"{type(problem).__name__}: {first_line(problem)}"
    return state


def judge(name: str, state: Mapping[str, Any]) -> Finding:
    """Turn a process's state into a finding.

    Args:
        name: which process.
        state: what `plugin_state` returned there.
    """
    if not state["installed"]:
        return error(
            name,
            f"no entry point of the group verl.plugins names {PLUGIN}",
            "pip install hpo-verl into the environment of this process",
        )
    if not state["permitted"]:
        return error(
            name,
            f"{POLICY_VARIABLE}={state['policy']} keeps verl from loading the plugin",
            f"unset {POLICY_VARIABLE}, or add {ENTRY_POINT} to it",
        )
    if state["failure"]:
        return error(
            name, f"the plugin fails to load: {state['failure']}", "reinstall hpo-verl and verl"
        )
    if not state["loaded"]:
        return error(
            name, "`import verl` did not load the plugin", "reinstall hpo-verl and verl 0.9.1"
        )
    if state["absent"]:
        return error(
            name,
            "; ".join(state["absent"]),
            "remove the other plugin that takes these names, or reinstall hpo-verl",
        )
    return ok(name, "loaded by verl; all estimators, losses, trainer modes and rollouts registered")


def check_here() -> Finding:
    """The plugin in this process."""
    return judge("plugin", plugin_state())
