"""Whose code a configuration would run.

Hydra calls whatever `_target_` names and verl imports modules and files that
settings name, so a recipe from a stranger is a program from a stranger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_prep.policies.folder import check_no_code_in
from hpo_verl.checks.finding import Finding, error, ok, skipped, warning
from hpo_verl.checks.model import other_folders
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.settings import POLICY_KEY, leaves

OWN_PACKAGES = ("verl.", "hpo_verl.")
HYDRA_TARGETS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra.experimental.callbacks.LogJobReturnCallback",
    "hydra.experimental.callbacks.PickleJobInfoCallback",
)
# Last part of a key whose value verl imports by its dotted name.
NAMED_KEYS = (
    *("external_lib", "custom_backend_module", "agent_loop_manager_class", "router_class"),
    *("checkpoint_manager_class", "checkpoint_callback_class", "worker_cls"),
    "worker_extension_cls",
)
# verl imports what `optimizer_impl` names; these are the packages that its documentation knows.
OPTIMIZER_KEY = "optimizer_impl"
OPTIMIZERS = ("torch.optim", "torchao.optim", "bitsandbytes.optim")
# Ends of keys whose value is a file, or `pkg://` and a module, that verl loads.
FILE_KEYS = (
    *("custom_cls.path", "custom_reward_function.path", "custom_sampler.path"),
    *("reward_manager.module.path", "custom_async_server.path", "reward_loop_module_path"),
    *("function_tool_path", "tool_config_path", "agent_loop_config_path"),
    *("interaction_config_path", "router_config_path"),
)
PACKAGE_PREFIX = "pkg://"


def check_code(run: PlannedRun) -> list[Finding]:
    """Everything that a configuration would call or load; before any of it is instantiated."""
    # Unresolved, since an interpolation may hide a name.
    whole = OmegaConf.to_container(run.whole, resolve=False)
    return [check_targets(whole), check_loaded_code(OmegaConf.to_container(run.config))]


def check_targets(whole: Any) -> Finding:
    """Whether every `_target_` belongs to verl, to this package, or is one of Hydra's own."""
    targets = [(key, str(value)) for key, value in leaves(whole) if _last(key) == "_target_"]
    others = [
        f"{key}={value}"
        for key, value in targets
        if value not in HYDRA_TARGETS and not _of_ours(value)
    ]
    if others:
        text = (
            f"{'; '.join(others)}: would be called; permitted are names below "
            f"{' and '.join(OWN_PACKAGES)} and Hydra's own launchers and callbacks"
        )
        return error(text, "remove the setting", "targets")
    return ok(f"{len(targets)} `_target_` entries, all of verl, hpo_verl or Hydra", "targets")


def check_loaded_code(config: Any) -> Finding:
    """Whether verl would load modules, files or a model's code besides its own and ours."""
    modules, files = _loaded_code(config)
    texts = [f"{one}: not code of verl or hpo_verl" for one in modules]
    texts += [f"{key}={path}: no such file" for key, path in files if not path.is_file()]
    fixes = ["name a file of yours, which is shown, or pkg://hpo_verl.<module>"] if texts else []
    for key, value in leaves(config):
        if _last(key) == "trust_remote_code" and value not in (None, False):
            texts.append(f"{key}=True: would execute code out of a model's folder")
            fixes.append(f"{key}=false")
    if texts:
        return error("; ".join(texts), ", ".join(fixes), "code")
    if files:
        text = "; ".join(f"{key}={path} will be executed" for key, path in files)
        return warning(text, "continue only if you have read these files", "code")
    return ok("nothing is loaded but verl and hpo_verl", "code")


def _loaded_code(config: Any) -> tuple[list[str], list[tuple[str, Path]]]:
    """`key=value` of every such module, and key and path of every such file."""
    modules, files = [], []
    for key, value in leaves(config):
        if not isinstance(value, str) or not value:
            continue
        # A list of modules ends in its index.
        parts = [part for part in key.split(".") if not part.isdigit()]
        named = parts[-1] in NAMED_KEYS or (parts[-1] == OPTIMIZER_KEY and value not in OPTIMIZERS)
        is_file = ".".join(parts).endswith(FILE_KEYS)
        if is_file and not value.startswith(PACKAGE_PREFIX):
            files.append((key, Path(value.removeprefix("file://")).expanduser()))
            continue
        name = value.removeprefix(PACKAGE_PREFIX).replace("/", ".") if is_file else value
        if (named or is_file) and not _of_ours(name):
            modules.append(f"{key}={value}")
    return modules, files


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _of_ours(name: str) -> bool:
    return name.startswith(OWN_PACKAGES) and ".." not in name


def check_model_code(run: PlannedRun) -> Finding:
    """Whether no folder of a model brings code: verl's reward workers would execute it in any case.

    They load the tokenizer with `trust_remote_code=True`, whatever the configuration says.
    """
    if not run.policy_folder.is_dir():
        return skipped("the policy's folder is not there")
    for key, folder in ((POLICY_KEY, run.policy_folder), *other_folders(run.config)):
        check_no_code_in(folder, key)
    return ok("none in the models' folders")
