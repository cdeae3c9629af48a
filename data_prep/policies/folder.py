"""Folders of policies: there whole or not at all, with a manifest that tells a later change."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.command import staging
from hpo_verl.errors import DataError
from hpo_verl.runs.files import sha256_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_policy(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Save a policy as a Hugging Face folder, in the place of an older one.

    Returns the manifest: the facts, and the files' digests. Raises DataError where the folder
    cannot be written.
    """
    with staging(out.parent) as temporary:
        new = temporary / out.name
        new.mkdir()
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        written = write_manifest(new, manifest, facts)
        if out.exists():
            os.replace(out, temporary / "old")
        os.replace(new, out)
    return written


def write_manifest(folder: Path, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write a manifest beside the files whose SHA-256 it lists, and return it."""
    digests = {path.name: sha256_once(path) for path in sorted(folder.iterdir())}
    manifest = {**facts, "files": digests}
    (folder / name).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path, name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a manifest that must have certain keys besides `files`, or raise DataError."""
    path = folder / name
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if {*keys, "files"} <= manifest.keys() and isinstance(manifest["files"], dict):
            return manifest
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; remove {folder}") from error
    except (ValueError, AttributeError):
        pass
    raise DataError(f"{path}: is not a manifest of this package; remove {folder}")


def check_files(folder: Path, name: str, manifest: Mapping[str, Any], remedy: str) -> None:
    """Check that a folder holds the files of its manifest, unchanged; or name file and remedy."""
    for file, digest in manifest["files"].items():
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise DataError(f"{path}: no such file, but {name} lists it; {remedy}")
        if sha256_once(path) != digest:
            raise DataError(f"{path}: its sha256 is not the one in {name}; {remedy}")


def check_no_code_in(folder: Path, key: str) -> None:
    """Refuse a model folder that brings code of its own.

    verl's reward workers load the tokenizer with `trust_remote_code=True`, whatever the
    configuration says, so the folder's content is looked at.

    Raises:
        DataError: Names `key`, which led to the folder, and the file.
    """
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):
            # Another check reports a file that cannot be read.
            continue
        if isinstance(content, dict) and "auto_map" in content:
            raise DataError(f"{key}: {file} names code to execute (auto_map)")
    for file in sorted(folder.glob("*.py")):
        raise DataError(f"{key}: {folder} holds code, {file.name}")
