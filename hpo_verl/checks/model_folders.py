"""Whether the folders of models that a run loads are whole, and bring no code."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from data_prep.policies.folder import check_no_code_in
from hpo_verl.config.prepare import preparations
from hpo_verl.config.settings import leaves
from hpo_verl.errors import DataError

KEY = "actor_rollout_ref.model.path"
INDEX = "model.safetensors.index.json"
# Last part of the keys of further folders that verl takes weights or a tokenizer from.
FOLDER_KEYS = (
    "tokenizer_path",
    "hf_config_path",
    "lora_adapter_path",
    "adapter_path",
    "model_path",
)
PICKLES = (".bin", ".pt", ".pth", ".pkl")
HOW_TO_FETCH = (
    "; a model of the hub is fetched at a commit: python -m data_prep.policies.hub, or in a recipe "
    "prepare.policy.arguments.repo=NAME prepare.policy.arguments.revision=COMMIT"
)


def policy_folder(config: DictConfig) -> Path:
    """Where the policy's files are, or will be."""
    return Path(str(OmegaConf.select(config, KEY))).expanduser()


def check_model(config: DictConfig) -> None:
    """Check that the model's folder holds a configuration, a tokenizer and whole weights.

    A name on the hub is refused: it means the newest commit there, and verl would load
    that before anybody could look at it.

    Raises:
        DataError: names the folder and what it lacks.
    """
    path = policy_folder(config)
    if not path.is_dir():
        made = any(path == preparation.output for preparation in preparations(config))
        raise DataError(f"{KEY}: {path} is not a folder{'' if made else HOW_TO_FETCH}")
    for wanted, files in (
        ("a config.json", ["config.json"]),
        ("a tokenizer", ["tokenizer.json", "tokenizer.model", "vocab.json"]),
    ):
        if not any((path / file).is_file() for file in files):
            raise DataError(f"{KEY}: {path} holds no {wanted.split(' ', 1)[1]}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise DataError(f"{KEY}: {path} holds no weights (*.safetensors)")
    for file in weights:
        _check_safetensors(file)
    for name in sorted(set(_index(path).values())):
        if not (path / name).is_file():
            raise DataError(f"{KEY}: {path} holds no {name}, which {INDEX} names")


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file, where the weights are in several; empty without an index.

    Raises:
        DataError: the index cannot be read.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{KEY}: {path} is not an index of weights ({error})") from error


def _check_safetensors(file: Path) -> None:
    """Compare the size of a safetensors file with what its header promises."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < size else None
        if header is None:
            raise ValueError("its header is longer than the file")
        end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise DataError(f"{KEY}: {file} is not a safetensors file ({error})") from error
    if size != 8 + length + end:
        raise DataError(f"{KEY}: {file} has {size} bytes; its header promises {8 + length + end}")


def other_folders(config: DictConfig) -> Iterator[tuple[str, Path]]:
    """Key and folder of whatever else a run loads of a model."""
    named = dict(leaves(OmegaConf.to_container(config, resolve=True)))
    needs_critic = named.get("critic.enable") or named.get("algorithm.adv_estimator") == "gae"
    for key, value in named.items():
        is_critic = key == "critic.model.path" and needs_critic
        if value and (is_critic or key.rsplit(".", 1)[-1] in FOLDER_KEYS):
            yield key, Path(str(value)).expanduser()


def check_other_models(config: DictConfig) -> None:
    """Check that whatever else a run loads of a model is a folder without pickles.

    Raises:
        DataError: names the key and what it names.
    """
    for key, folder in other_folders(config):
        if not folder.is_dir():
            raise DataError(f"{key}: {folder} is not a folder{HOW_TO_FETCH}")
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles and not any(folder.glob("*.safetensors")):
            raise DataError(f"{key}: {folder} holds {pickles[0]}; weights must be safetensors")


def check_no_code(config: DictConfig) -> None:
    """Check that no folder of a model brings code of its own.

    Raises:
        DataError: names the key and the file.
    """
    for key, folder in ((KEY, policy_folder(config)), *other_folders(config)):
        check_no_code_in(folder, key)
