"""What a run loads: whose code, and whether its models are folders here, whole and long enough.

Hydra calls whatever `_target_` names and verl imports modules and files that
settings name, so a recipe from a stranger is a program from a stranger.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.policies.folder import check_no_code_in, turn_end
from hpo_verl.checks.finding import Finding, error, ok, one_line, skipped, warning
from hpo_verl.checks.model_size import weight_shapes
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.settings import POLICY_KEY, leaves
from hpo_verl.errors import DataError

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

INDEX = "model.safetensors.index.json"
# Last part of the keys of further folders that verl takes weights or a tokenizer from.
FOLDER_KEYS = (
    *("tokenizer_path", "hf_config_path", "lora_adapter_path", "adapter_path", "model_path"),
)
NEEDED = {
    "config.json": ["config.json"],
    "tokenizer": ["tokenizer.json", "tokenizer.model", "vocab.json"],
}
PICKLES = (".bin", ".pt", ".pth", ".pkl")
HOW_TO_FETCH = (
    "; a model of the hub is fetched at a commit: python -m data_prep.policies.hub, or in a recipe "
    "prepare.policy.arguments.repo=NAME prepare.policy.arguments.revision=COMMIT"
)


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


def check_model(run: PlannedRun) -> Finding:
    """Whether the policy is whole, its other models are there, and nobody changed what was made.

    A name on the hub is refused: it means the newest commit there, and verl would load
    that before anybody could look at it.
    """
    folder = run.policy_folder
    anew = run.how_to_make(folder, f"copy the model there, or {POLICY_KEY}=FOLDER")
    try:
        run.check_made(folder)
        check_policy(folder, "" if run.maker(folder) else HOW_TO_FETCH)
    except DataError as problem:
        return error(one_line(problem), anew)
    for text in other_faults(run.config):
        return error(text, "copy that model there, or name another folder")
    return ok(f"{folder}: configuration, tokenizer and whole weights")


def check_policy(folder: Path, hint: str = "") -> None:
    """Raise a DataError where a folder lacks a configuration, a tokenizer or whole weights."""
    where = f"{POLICY_KEY}: {folder}"
    if not folder.is_dir():
        raise DataError(f"{where} is not a folder{hint}")
    for what, files in NEEDED.items():
        if not any((folder / file).is_file() for file in files):
            raise DataError(f"{where} holds no {what}")
    try:
        weight_shapes(folder)
    except DataError as problem:
        raise DataError(f"{POLICY_KEY}: {problem}") from problem
    index = folder / INDEX
    try:
        # Tensor -> file, where the weights are in several.
        named = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ()
        absent = sorted(name for name in set(named) if not (folder / name).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise DataError(f"{where}/{INDEX} is not an index of weights ({problem})") from problem
    if absent:
        raise DataError(f"{where} holds no {absent[0]}, which {INDEX} names")


def other_folders(config: DictConfig) -> Iterator[tuple[str, Path]]:
    """Key and folder of whatever else a run loads of a model."""
    named = dict(leaves(OmegaConf.to_container(config, resolve=True)))
    needs_critic = named.get("critic.enable") or named.get("algorithm.adv_estimator") == "gae"
    for key, value in named.items():
        is_critic = key == "critic.model.path" and needs_critic
        if value and (is_critic or key.rsplit(".", 1)[-1] in FOLDER_KEYS):
            yield key, Path(str(value)).expanduser()


def other_faults(config: DictConfig) -> Iterator[str]:
    """What else a run loads of a model that is no folder, or holds weights as pickles only."""
    for key, folder in other_folders(config):
        if not folder.is_dir():
            yield f"{key}: {folder} is not a folder{HOW_TO_FETCH}"
            continue
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles and not any(folder.glob("*.safetensors")):
            yield f"{key}: {folder} holds {pickles[0]}; weights must be safetensors"


def check_positions(run: PlannedRun) -> Finding:
    """Whether prompt and response fit into the positions the model was made for."""
    key = "max_position_embeddings"
    try:
        stated = json.loads((run.policy_folder / "config.json").read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        stated = None
    limit = run.get(f"actor_rollout_ref.model.override_config.{key}", stated)
    if not isinstance(limit, int):
        return skipped(f"no config.json of the model names {key}")
    if run.longest > limit:
        lengths = "data.max_prompt_length + data.max_response_length"
        return error(f"{lengths} = {run.longest}: the model has {limit}", "shorter lengths")
    return ok(f"{run.longest} of {limit}")


def check_tokenizer(run: PlannedRun) -> Finding:
    """Whether the policy's tokenizer writes chats, and knows a token that ends a response."""
    folder = run.policy_folder
    if not folder.is_dir():
        return skipped("the recipe's tokenizer cannot be read here")
    where, fix = f"the tokenizer of {folder}", "a tokenizer with a chat template"
    try:
        tokenizer = run.tokenizer
    except Exception as problem:
        return error(f"{where} cannot be read: {one_line(problem)}", fix)
    if not tokenizer.chat_template:
        fix = f"{fix}, or actor_rollout_ref.model.custom_chat_template"
        return error(f"{where} has no chat template", fix)
    if tokenizer.eos_token is None:
        # verl pads with it where no other token is named.
        text = f"{where} names no token that ends a response (eos_token)"
        return error(text, f"eos_token in {folder}/tokenizer_config.json")
    ends = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(_stated_ends(folder))]
    shown = " or ".join(dict.fromkeys(map(repr, ends)))
    try:
        after = turn_end(tokenizer)
    except Exception:
        # A template may refuse such a chat; the check of the prompts tries the run's own.
        after = ""
    if after.strip() and not any(str(end) in after for end in ends):
        return warning(
            f"{where}: {shown} ends a response, but the chat template ends an answer with "
            f"{after!r}: a policy trained on such chats never ends one",
            f"eos_token in {folder}/tokenizer_config.json and eos_token_id in "
            f"generation_config.json, unless the policy was trained without chats",
        )
    return ok(f"{shown} ends a response, {tokenizer.pad_token!r} pads")


def _stated_ends(folder: Path) -> list[int]:
    """Ids of the tokens that end a response besides the tokenizer's, as transformers reads them."""
    for name in ("generation_config.json", "config.json"):
        try:
            stated = json.loads((folder / name).read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found = stated if isinstance(stated, list) else [stated]
        return [token for token in found if isinstance(token, int)]
    return []


def check_model_code(run: PlannedRun) -> Finding:
    """Whether no folder of a model brings code: verl's reward workers would execute it in any case.

    They load the tokenizer with `trust_remote_code=True`, whatever the configuration says.
    """
    if not run.policy_folder.is_dir():
        return skipped("the policy's folder is not there")
    for key, folder in ((POLICY_KEY, run.policy_folder), *other_folders(run.config)):
        check_no_code_in(folder, key)
    return ok("none in the models' folders")
