"""What a command made, in its folder: from what, and each file's SHA-256."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpo_verl.errors import DataError
from hpo_verl.runs.files import sha256_once

# Of data; a policy's has another name.
PREPARED = "prepared.json"


def write_manifest(folder: Path, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write a manifest beside the files whose SHA-256 it lists, and return it."""
    digests = {path.name: sha256_once(path) for path in sorted(folder.iterdir())}
    manifest = {**facts, "files": digests}
    (folder / name).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path, name: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a manifest that must have certain keys besides `files`, or raise DataError."""
    path = folder / name
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        names = manifest["files"].keys()
        if {*keys} <= manifest.keys() and all(Path(file).name == file for file in names):
            return manifest
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise DataError(f"{path}: is not a manifest of this package")


def file_faults(folder: Path, name: str, manifest: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Each file of a manifest that is gone or was changed, and what is wrong with it."""
    for file, digest in manifest["files"].items():
        path = folder / file
        try:
            if sha256_once(path) != digest:
                yield path, f"{path}: its sha256 is not the one in {name}"
        except FileNotFoundError:
            yield path, f"{path}: no such file, but {name} lists it"
        except OSError as error:
            yield path, f"{path}: {error.strerror}"


def check_files(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Raise a DataError unless a folder holds the files of its manifest, unchanged."""
    for _, fault in file_faults(folder, name, manifest):
        raise DataError(fault)
