"""Whether the policy can be read, without code of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpo_verl.checks import model_folders
from hpo_verl.checks.finding import Finding, attempt, error, ok, skipped
from hpo_verl.checks.model_folders import KEY
from hpo_verl.checks.subject import Subject
from hpo_verl.config.prepare import check_made
from hpo_verl.errors import DataError


def check_model(subject: Subject) -> list[Finding]:
    """All checks of the policy's files, and of other models that the run loads."""
    return [_whole(subject), _own_code(subject), _positions(subject)]


def _whole(subject: Subject) -> Finding:
    folder = subject.policy_folder
    maker = subject.maker(folder)
    anew = subject.making(maker) if maker else f"copy the model there, or {KEY}=FOLDER"
    if maker and folder.exists():
        anew = f"remove {folder}, then {anew}"
    for check, fix in (
        (model_folders.check_model, anew),
        (model_folders.check_other_models, "copy that model there, or name another folder"),
        (check_made, anew),
    ):
        try:
            check(subject.config)
        except DataError as problem:
            return error("model", str(problem), fix)
    return ok("model", f"{folder}: configuration, tokenizer and whole weights")


def _own_code(subject: Subject) -> Finding:
    """A model's own code: verl's reward workers would execute it in any case."""
    if not subject.policy_folder.is_dir():
        return skipped("remote code", "the policy's folder is not there")

    def look() -> str:
        model_folders.check_no_code(subject.config)
        return "none in the models' folders"

    return attempt("remote code", look, "a model whose architecture transformers knows")


def _positions(subject: Subject) -> Finding:
    """Prompt and response must fit into the positions the model was made for."""
    key = "max_position_embeddings"
    override = subject.get(f"actor_rollout_ref.model.override_config.{key}")
    limit = override or _json(subject.policy_folder / "config.json").get(key)
    if not isinstance(limit, int):
        return skipped("positions", "no config.json of the model names max_position_embeddings")
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
