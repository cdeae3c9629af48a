"""Folders of policies: there whole or not at all, and without code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.command import staging
from data_prep.manifest import write_manifest
from hpo_verl.errors import DataError

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


def check_replaceable(out: Path, manifest: str) -> None:
    """Raise a DataError where a folder holds files, but no manifest of a policy made earlier."""
    if out.is_dir() and any(out.iterdir()) and not (out / manifest).is_file():
        raise DataError(f"{out}: holds files but no {manifest}; name a new or an empty folder")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the chat template of a tokenizer writes after an answer."""
    answer = "An answer."
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition(answer)[2]


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
