"""Whether the models that a run loads are folders here, whole, and long enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hpo_verl.checks.finding import Finding, error, first_line, ok, skipped
from hpo_verl.checks.memory import weight_shapes
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.prepare import check_made
from hpo_verl.config.settings import POLICY_KEY, leaves
from hpo_verl.errors import DataError

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


def check_model(run: PlannedRun) -> Finding:
    """Whether the policy is whole, its other models are there, and nobody changed what was made.

    A name on the hub is refused: it means the newest commit there, and verl would load
    that before anybody could look at it.
    """
    folder = run.policy_folder
    anew = run.how_to_make(folder, f"copy the model there, or {POLICY_KEY}=FOLDER")
    try:
        check_policy(folder, "" if run.maker(folder) else HOW_TO_FETCH)
        check_made(run.config)
    except DataError as problem:
        return error(first_line(problem), anew)
    for text in other_faults(run.config):
        return error(text, "copy that model there, or name another folder")
    return ok(f"{folder}: configuration, tokenizer and whole weights")


def check_policy(folder: Path, hint: str = "") -> None:
    """Check that a folder holds a configuration, a tokenizer and whole weights.

    Raises:
        DataError: names the folder and what it lacks; with the hint where there is no folder.
    """
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
