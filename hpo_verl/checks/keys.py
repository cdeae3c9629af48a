"""Whether anybody reads each key in the files of a recipe of the user's own.

Hydra refuses an unknown key behind the command, but lets files add any: a misspelt one would be
kept, and never read.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_verl.checks.finding import Finding, error, ok
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.overrides import nearest
from hpo_verl.config.recipes import recipes_directory, verl_configurations, verl_defaults
from hpo_verl.config.settings import leaves
from hpo_verl.runs.quiet import quiet_imports

# Sections that hold what their reader likes, besides those that are {} or null in verl's defaults.
OPEN = (
    *("hydra", "names", "prepare", "ray_kwargs.ray_init", "transfer_queue"),
    *("global_profiler.global_tool_config", "distillation.teacher_models"),
    "actor_rollout_ref.rollout.custom",
)
# What verl reads, and has no default for.
READ_BY_VERL = (
    *("algorithm.gdpo_reward_keys", "reward.reward_kwargs", "reward.timeout"),
    *("reward.custom_reward_function.reward_kwargs", "trainer.remove_previous_ckpt_in_save"),
    *("actor_rollout_ref.actor.use_prefix_grouper", "data.audio_key", "data.cache_dir"),
    *("data.chat_template_func", "data.filter_prompts", "data.image_patch_size"),
    *("data.mm_processor_kwargs", "data.need_tools_kwargs", "data.return_multi_modal_inputs"),
    *("data.function_tool_path", "data.gen_batch_size", "data.prefetch_factor", "data.use_shm"),
)
_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)")
_GROUP_HINT = "; the file of a group begins with the line `# @package _global_`"


def check_keys(run: PlannedRun) -> Finding:
    """Whether a file of the user's holds a key that nobody reads; names it and the nearest one."""
    files = list(_own_files(run))
    known = _known() if files else {}
    for path, content, hint in files:
        for name, siblings in _unknown(content, known):
            if _is_read(run, name):
                continue
            key = name.rpartition(".")[2]
            if close := difflib.get_close_matches(key, siblings, cutoff=0.6):
                closest = f"did you mean {' or '.join(close)}?"
            else:
                every = {key for key, _ in leaves(known)}
                closest = nearest(key, every)
            fix = f"correct it, or take it out: +{name}=VALUE behind the command is never refused"
            return error(f"{path}: unknown setting {name}: {closest}{hint}", fix)
    shown = ", ".join(str(path) for path, _, _ in files)
    return ok(f"those in {shown} are known" if files else "no file of the recipe is the user's own")


def _own_files(run: PlannedRun) -> Iterator[tuple[Path, Any, str]]:
    """The recipe's file, those it builds on and its groups, without ours: path, content, hint."""
    runtime = OmegaConf.select(run.whole, "hydra.runtime")
    if runtime is None:
        return
    ours = {recipes_directory(), verl_configurations()}
    folders = [Path(one.path) for one in runtime.config_sources if one.schema == "file"]
    folders = [folder for folder in folders if folder not in ours]
    names = [str(run.whole.hydra.job.config_name).removesuffix(".yaml")]
    names += [f"{group.partition('@')[0]}/{option}" for group, option in runtime.choices.items()]
    for name in names:
        files = (folder / f"{name}.yaml" for folder in folders)
        if (file := next((file for file in files if file.is_file()), None)) is None:
            continue
        loaded = OmegaConf.load(file)
        if not isinstance(loaded, DictConfig):
            continue
        content: Any = OmegaConf.to_container(loaded, resolve=False)
        group = name.rpartition("/")[0]
        # Files beside it that it builds on; groups are among the choices.
        names += [
            entry
            for entry in content.pop("defaults", None) or []
            if not group and isinstance(entry, str) and entry not in names
        ]
        stated = _PACKAGE.search(file.read_text(encoding="utf-8").partition("\n\n")[0])
        package = stated[1] if stated else group.replace("/", ".") or "_global_"
        package = group.replace("/", ".") if package == "_group_" else package
        for part in reversed(package.split(".") if package != "_global_" else []):
            content = {part: content}
        yield file, content, _GROUP_HINT if group and not stated else ""


def _known() -> dict[str, Any]:
    """Keys that verl's defaults and the recipes of this package hold, as nested dictionaries.

    What is open has None as its value.
    """
    known: Any = OmegaConf.to_container(verl_defaults(), resolve=False)
    _open(known)
    for folder in (".", "*"):
        for file in recipes_directory().glob(f"{folder}/*.yaml"):
            if file.parent.name != "lab":
                content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
                content.pop("defaults", None)
                _add(known, content)
                # What only another group reads, such as `warm_start` of a task.
                for name in _references(content):
                    _add_name(known, name)
    for name in (*OPEN, *READ_BY_VERL):
        node, (*parts, last) = known, name.split(".")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = None
    return known


def _references(content: Any) -> Iterator[str]:
    """Keys that values refer to."""
    for _, value in leaves(content):
        if isinstance(value, str):
            yield from _REFERENCE.findall(value)


def _add_name(known: dict[str, Any], name: str) -> None:
    content: Any = None
    for part in reversed(name.split(".")):
        content = {part: content}
    _add(known, content)


def _open(node: dict[str, Any]) -> None:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            _open(value)
        else:
            node[key] = None


def _add(known: dict[str, Any], content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if not isinstance(value, dict):
            known.setdefault(key, None)
        elif known.setdefault(key, {}) is not None:
            _add(known[key], value)


def _unknown(
    content: Mapping[Any, Any], known: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Dotted names of the keys that are not known, each with those known beside it."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in known:
            yield name, list(known)
        elif isinstance(value, dict) and known[key] is not None:
            yield from _unknown(value, known[key], f"{name}.")


def _is_read(run: PlannedRun, name: str) -> bool:
    """Whether something refers to a key, or the class that verl makes of its section has it."""
    whole: Any = OmegaConf.to_container(run.whole, resolve=False)
    for found in _references(whole):
        if f"{found}.".startswith(f"{name}.") or f"{name}.".startswith(f"{found}."):
            return True
    section, _, key = name.rpartition(".")
    if section == "algorithm":
        from hpo_verl.algorithms.registry import OUR_ESTIMATORS

        if key in {estimator.section for estimator in OUR_ESTIMATORS.values()}:
            # Whoever selects the algorithm checks them.
            return True
    target = OmegaConf.select(run.whole, f"{section}._target_") if section else None
    if target is None:
        return False
    module, _, title = str(target).rpartition(".")
    with quiet_imports():
        made = getattr(importlib.import_module(module), title)
    return key in {field.name for field in dataclasses.fields(made)}
