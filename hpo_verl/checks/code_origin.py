"""Whose code a configuration would run.

Hydra calls whatever `_target_` names and verl imports modules and files that
settings name, so a recipe from a stranger is a program from a stranger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpo_verl.config.settings import leaves

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
# verl imports what `optimizer_impl` names; these are the packages that its documentation knows.
OPTIMIZER_KEY = "optimizer_impl"
OPTIMIZERS = ("torch.optim", "torchao.optim", "bitsandbytes.optim")
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


def targets(whole: Any) -> list[tuple[str, str]]:
    """Key and value of every `_target_` in plain containers."""
    return [
        (key, str(value)) for key, value in leaves(whole) if key.rsplit(".", 1)[-1] == "_target_"
    ]


def strange_targets(whole: Any) -> list[str]:
    """Those `_target_` entries that are neither verl's, nor this package's, nor Hydra's own.

    Args:
        whole: the composed configuration as plain containers, Hydra's part included.

    Returns:
        `key=value` of each.
    """
    return [
        f"{key}={value}"
        for key, value in targets(whole)
        if value not in HYDRA_TARGETS and not _of_ours(value)
    ]


def strange_code(config: Any) -> tuple[list[str], list[tuple[str, Path]]]:
    """Modules and files that verl would load besides its own and this package's.

    Args:
        config: the configuration as plain containers.

    Returns:
        `key=value` of every module, and key and path of every file.
    """
    strange: list[str] = []
    files: list[tuple[str, Path]] = []
    for key, value in leaves(config):
        if not isinstance(value, str) or not value:
            continue
        # A list of modules ends in its index.
        name = [part for part in key.split(".") if not part.isdigit()]
        named = name[-1] in NAMED_KEYS or (name[-1] == OPTIMIZER_KEY and value not in OPTIMIZERS)
        if named and not _of_ours(value):
            strange.append(f"{key}={value}")
        elif ".".join(name).endswith(FILE_KEYS):
            if not value.startswith(PACKAGE_PREFIX):
                files.append((key, Path(value.removeprefix("file://")).expanduser()))
            elif not _of_ours(value.removeprefix(PACKAGE_PREFIX).replace("/", ".")):
                strange.append(f"{key}={value}")
    return strange, files


def trusted_remotes(config: Any) -> list[str]:
    """Keys that would let a model folder run its own code."""
    return [
        key
        for key, value in leaves(config)
        if key.rsplit(".", 1)[-1] == "trust_remote_code" and value not in (None, False)
    ]


def _of_ours(name: str) -> bool:
    return name.startswith(OWN_PACKAGES) and ".." not in name
