"""Whether the policy can be read, here or from the hub, without code of its own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo_verl.doctor.finding import Finding, error, first_line, ok, skipped, warning
from hpo_verl.doctor.model_size import KNOWN_MODELS, ModelSize, read_model_size
from hpo_verl.doctor.subject import Subject
from hpo_verl.errors import DataError
from hpo_verl.launch import checks
from hpo_verl.launch.prepare import check_made, preparations

KEY = "actor_rollout_ref.model.path"
TRUST_KEYS = ("actor_rollout_ref.model.trust_remote_code", "data.trust_remote_code")
HUB_SECONDS = 10.0


@dataclass(frozen=True)
class Model:
    """What is known of the policy.

    Attributes:
        name: folder or hub id, as configured.
        folder: where its files are on this machine; None if they are not.
        size: its dimensions; None if unknown.
    """

    name: str
    folder: Path | None
    size: ModelSize | None


def find_model(subject: Subject) -> Model:
    """Look for the policy on this machine, without the network."""
    name = str(subject.get(KEY))
    path = Path(name).expanduser()
    folder = path if path.is_dir() else _cached(name) if is_hub_id(name) else None
    size = None
    if folder is not None:
        try:
            size = read_model_size(folder)
        except DataError:
            # Said by check_dimensions.
            size = None
    return Model(name, folder, size or KNOWN_MODELS.get(name))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `organisation/model` and is no path."""
    return name.count("/") == 1 and name[0] not in "/.~"


def _cached(name: str) -> Path | None:
    """Folder of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def check_model(subject: Subject, model: Model) -> list[Finding]:
    """All checks of the policy's files."""
    return [_readable(subject, model), _remote_code(subject, model), _positions(subject, model)]


def _readable(subject: Subject, model: Model) -> Finding:
    if model.folder is None and is_hub_id(model.name):
        return _on_the_hub(subject, model.name)
    folder = model.folder or Path(model.name).expanduser()
    try:
        checks.check_model_folder(subject.config, folder)
        _check_shards(folder)
        check_made(subject.config)
    except DataError as problem:
        if is_hub_id(model.name):
            return _on_the_hub(subject, model.name)
        made = any(p.output == folder for p in preparations(subject.config))
        fix = subject.command("prepare") if made else f"copy the model there, or {KEY}=FOLDER"
        return error("model", str(problem), fix)
    where = f" of {model.name}" if is_hub_id(model.name) else ""
    return ok("model", f"{folder}{where}: configuration, tokenizer and whole weights")


def _check_shards(folder: Path) -> None:
    """Check that every file that the weights' index names is there.

    Raises:
        DataError: names the first that is not.
    """
    index = _json(folder / "model.safetensors.index.json").get("weight_map") or {}
    for name in sorted(set(index.values())):
        if not (folder / name).is_file():
            raise DataError(f"{KEY}: {folder} holds no {name}, which its index names")


def _on_the_hub(subject: Subject, name: str) -> Finding:
    """A hub id that is not, or not wholly, in the local cache."""
    fix = f"hf download {name}, or {KEY}=FOLDER"
    if subject.on_cpu or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return error(
            "model", f"{KEY}={name}: not whole in the local cache, and the run is offline", fix
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().auth_check(name)
        facts = HfApi().model_info(name, timeout=HUB_SECONDS)
    except GatedRepoError:
        return error(
            "model", f"{KEY}={name}: gated", f"accept its terms on the hub, set HF_TOKEN; {fix}"
        )
    except RepositoryNotFoundError:
        return error("model", f"{KEY}={name}: the hub has no such model", "correct the name")
    except Exception as problem:
        return error(
            "model",
            f"{KEY}={name}: not whole in the local cache, and the hub cannot be asked: "
            f"{first_line(problem)}",
            fix,
        )
    files = {entry.rfilename for entry in facts.siblings or []}
    if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
        return error("model", f"{KEY}={name}: no config.json or no *.safetensors on the hub", fix)
    return warning(
        "model",
        f"{KEY}={name}: readable on the hub, not yet on this machine",
        f"hf download {name}",
    )


def _remote_code(subject: Subject, model: Model) -> Finding:
    trusted = [key for key in TRUST_KEYS if subject.get(key, False)]
    if trusted:
        return error(
            "remote code",
            f"{', '.join(f'{key}=true' for key in trusted)}: the model's own code would run",
            " ".join(f"{key}=false" for key in trusted),
        )
    if model.folder is None:
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
    if model.folder is None:
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
