"""Whether the folders of models that a run loads are whole, and bring no code."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hpo_verl.errors import DataError
from hpo_verl.launch.code_origin import check_no_code_in
from hpo_verl.launch.leaves import leaves
from hpo_verl.launch.prepare import preparations

KEY = "actor_rollout_ref.model.path"
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
    "; a model of the hub is fetched at a commit: python -m data_prep.hub_policy, or in a recipe "
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
    makers = [p.shown for p in preparations(config) if path == p.output]
    hint = f"; make it with: {makers[0]}" if makers else ""
    if not path.is_dir():
        raise DataError(f"{KEY}: {path} is not a folder{hint or HOW_TO_FETCH}")
    for wanted, files in (
        ("a config.json", ["config.json"]),
        ("a tokenizer", ["tokenizer.json", "tokenizer.model", "vocab.json"]),
    ):
        if not any((path / file).is_file() for file in files):
            raise DataError(f"{KEY}: {path} holds no {wanted.split(' ', 1)[1]}{hint}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise DataError(f"{KEY}: {path} holds no weights (*.safetensors){hint}")
    for file in weights:
        _check_safetensors(file)
    check_no_code_in(path, KEY)


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


def check_other_models(config: DictConfig) -> None:
    """Check that whatever else a run loads of a model is a folder without code or pickles.

    Raises:
        DataError: names the key and what it names.
    """
    named = dict(leaves(OmegaConf.to_container(config, resolve=True)))
    needs_critic = named.get("critic.enable") or named.get("algorithm.adv_estimator") == "gae"
    for key, value in named.items():
        is_critic = key == "critic.model.path" and needs_critic
        if not value or not (is_critic or key.rsplit(".", 1)[-1] in FOLDER_KEYS):
            continue
        folder = Path(str(value)).expanduser()
        if not folder.is_dir():
            raise DataError(f"{key}: {folder} is not a folder{HOW_TO_FETCH}")
        check_no_code_in(folder, key)
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles and not any(folder.glob("*.safetensors")):
            raise DataError(f"{key}: {folder} holds {pickles[0]}; weights must be safetensors")
