"""Whose code a configuration would run.

Hydra calls whatever `_target_` names and verl imports modules and files that
settings name, so a recipe from a stranger is a program from a stranger.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpo_verl.doctor.finding import Finding, error, ok, warning

OWN_PACKAGES = ("verl.", "hpo_verl.")
HYDRA_TARGETS = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra.experimental.callbacks.LogJobReturnCallback",
        "hydra.experimental.callbacks.PickleJobInfoCallback",
    }
)
# Last part of a key whose value verl imports by its dotted name.
NAMED_KEYS = frozenset(
    {
        "external_lib",
        "custom_backend_module",
        "agent_loop_manager_class",
        "checkpoint_manager_class",
        "checkpoint_callback_class",
        "router_class",
        "worker_extension_cls",
        "worker_cls",
    }
)
# Ends of keys whose value is a file, or `pkg://` and a module, that verl loads.
FILE_KEYS = (
    "custom_cls.path",
    "custom_reward_function.path",
    "custom_sampler.path",
    "reward_manager.module.path",
    "custom_async_server.path",
    "reward_loop_module_path",
    "function_tool_path",
    "tool_config_path",
    "agent_loop_config_path",
    "interaction_config_path",
    "router_config_path",
)
PACKAGE_PREFIX = "pkg://"


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


def check_targets(whole: Any) -> Finding:
    """Every `_target_` must belong to verl, to this package, or be one of Hydra's own.

    To be made before anything of the configuration is instantiated.

    Args:
        whole: the composed configuration as plain containers, Hydra's part included.
    """
    found = [
        (key, str(value)) for key, value in leaves(whole) if key.rsplit(".", 1)[-1] == "_target_"
    ]
    strange = [
        f"{key}={value}"
        for key, value in found
        if value not in HYDRA_TARGETS and not _of_ours(value)
    ]
    if strange:
        return error(
            "targets",
            f"{'; '.join(strange)}: would be called; permitted are names below "
            f"{' and '.join(OWN_PACKAGES)} and Hydra's own launchers and callbacks",
            "remove the override, or read that code and run verl without the doctor",
        )
    return ok("targets", f"{len(found)} `_target_` entries, all of verl, hpo_verl or Hydra")


def check_code(config: Any) -> Finding:
    """Modules and files that verl would load besides its own and this package's.

    Args:
        config: the configuration as plain containers.
    """
    strange, files = [], []
    for key, value in leaves(config):
        if not isinstance(value, str) or not value:
            continue
        # A list of modules ends in its index.
        name = [part for part in key.split(".") if not part.isdigit()]
        if name[-1] in NAMED_KEYS and not _of_ours(value):
            strange.append(f"{key}={value}")
        elif ".".join(name).endswith(FILE_KEYS):
            if not value.startswith(PACKAGE_PREFIX):
                files.append((key, value))
            elif not _of_ours(value.removeprefix(PACKAGE_PREFIX).replace("/", ".")):
                strange.append(f"{key}={value}")
    missing = [f"{key}={value}" for key, value in files if not _path(value).is_file()]
    if strange or missing:
        text = [f"{one}: not code of verl or hpo_verl" for one in strange]
        text += [f"{one}: no such file" for one in missing]
        return error(
            "code",
            "; ".join(text),
            "name a file of yours, which the doctor shows, or pkg://hpo_verl.<module>",
        )
    if files:
        return warning(
            "code",
            "; ".join(f"{key}={value} will be executed" for key, value in files),
            "go on only if you have read these files",
        )
    return ok("code", "nothing is loaded but verl and hpo_verl")


def _of_ours(name: str) -> bool:
    return name.startswith(OWN_PACKAGES) and ".." not in name


def _path(value: str) -> Path:
    return Path(value.removeprefix("file://")).expanduser()
