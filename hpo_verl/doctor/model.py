"""Whether the policy can be read, without code of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo_verl.doctor.finding import Finding, error, ok, skipped
from hpo_verl.doctor.model_size import KNOWN_MODELS, ModelSize, read_model_size
from hpo_verl.doctor.subject import Subject
from hpo_verl.errors import DataError
from hpo_verl.launch import checks
from hpo_verl.launch.model_folders import KEY, policy_folder
from hpo_verl.launch.prepare import check_made, preparations

TRUST_KEYS = ("actor_rollout_ref.model.trust_remote_code", "data.trust_remote_code")


@dataclass(frozen=True)
class Model:
    """What is known of the policy.

    Attributes:
        folder: where its files are, or will be once they are fetched or made.
        size: its dimensions; None if unknown.
    """

    folder: Path
    size: ModelSize | None


def find_model(subject: Subject) -> Model:
    """Look for the policy on this machine, without the network."""
    folder = policy_folder(subject.config)
    try:
        return Model(folder, read_model_size(folder))
    except DataError:
        # Said by check_model. What was not fetched yet may still be known.
        made_of_it = [p for p in preparations(subject.config) if p.output == folder]
        repo = subject.get("prepare.policy.arguments.repo") if made_of_it else None
        return Model(folder, KNOWN_MODELS.get(str(repo)))


def check_model(subject: Subject, model: Model) -> list[Finding]:
    """All checks of the policy's files."""
    return [_readable(subject, model), _remote_code(subject, model), _positions(subject, model)]


def _readable(subject: Subject, model: Model) -> Finding:
    try:
        checks.check_model(subject.config)
        checks.check_other_models(subject.config)
        _check_shards(model.folder)
        check_made(subject.config)
    except DataError as problem:
        made = any(p.output == model.folder for p in preparations(subject.config))
        fix = subject.command("prepare") if made else f"copy the model there, or {KEY}=FOLDER"
        return error("model", str(problem), fix)
    return ok("model", f"{model.folder}: configuration, tokenizer and whole weights")


def _check_shards(folder: Path) -> None:
    """Check that every file that the weights' index names is there.

    Raises:
        DataError: names the first that is not.
    """
    index = _json(folder / "model.safetensors.index.json").get("weight_map") or {}
    for name in sorted(set(index.values())):
        if not (folder / name).is_file():
            raise DataError(f"{KEY}: {folder} holds no {name}, which its index names")


def _remote_code(subject: Subject, model: Model) -> Finding:
    trusted = [key for key in TRUST_KEYS if subject.get(key, False)]
    if trusted:
        return error(
            "remote code",
            f"{', '.join(f'{key}=true' for key in trusted)}: the model's own code would run",
            " ".join(f"{key}=false" for key in trusted),
        )
    if not model.folder.is_dir():
        return skipped("remote code", "trust_remote_code is false; the files are not here to look")
    own = sorted(path.name for path in model.folder.glob("*.py"))
    named = [
        file
        for file in ("config.json", "tokenizer_config.json")
        if "auto_map" in _json(model.folder / file)
    ]
    if own or named:
        return error(
            "remote code",
            f"{model.folder}: {', '.join(own + named)} bring code of the model's own, which "
            "verl's reward workers would execute",
            "a model whose architecture transformers knows",
        )
    return ok("remote code", "none in the folder, and trust_remote_code is false")


def _positions(subject: Subject, model: Model) -> Finding:
    """Prompt and response must fit into the positions the model was made for."""
    if not model.folder.is_dir():
        return skipped("positions", "the model's config.json is not here")
    limit = _json(model.folder / "config.json").get("max_position_embeddings")
    if not isinstance(limit, int):
        return skipped("positions", "config.json names no max_position_embeddings")
    longest = subject.get("data.max_prompt_length") + subject.get("data.max_response_length")
    if longest > limit:
        return error(
            "positions",
            f"data.max_prompt_length + data.max_response_length = {longest}: the model has {limit}",
            "shorter lengths",
        )
    return ok("positions", f"{longest} of {limit}")


def _json(path: Path) -> dict[str, Any]:
    """Content of a JSON file, empty where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
