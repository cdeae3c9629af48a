"""`hpo-verl export`: a checkpoint of verl as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from hpo_verl.errors import DataError, EnvironmentCheckError
from hpo_verl.launch.checkpoints import TRACKER
from hpo_verl.launch.quiet import quiet_imports


def checkpoint_folder(source: Path) -> Path:
    """The folder with the actor's shards that a path means.

    Args:
        source: a run's folder, a checkpoints folder (both mean the last checkpoint),
            a `global_step_N` folder, or its `actor` folder.

    Raises:
        DataError: there is no checkpoint; names the folder and what it lacks.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder")
    for folder in (source, source / "actor"):
        if (folder / "fsdp_config.json").is_file():
            return folder
    for folder in (source, source / "checkpoints"):
        tracker = folder / TRACKER
        if tracker.is_file():
            actor = folder / f"global_step_{tracker.read_text().strip()}" / "actor"
            if not (actor / "fsdp_config.json").is_file():
                raise DataError(f"{tracker} names {actor.parent.name}, which is no FSDP checkpoint")
            return actor
    raise DataError(
        f"{source} is neither a run with checkpoints ({TRACKER}) nor an FSDP checkpoint "
        "(actor/fsdp_config.json)"
    )


def shard_files(checkpoint: Path) -> list[Path]:
    """The model shards of all ranks.

    Raises:
        DataError: `fsdp_config.json` is unreadable, or a shard or model file is missing.
    """
    settings = checkpoint / "fsdp_config.json"
    try:
        ranks = int(json.loads(settings.read_text())["world_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{settings} does not say how many ranks saved it") from error
    files = [checkpoint / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    for file in (*files, checkpoint / "huggingface" / "config.json"):
        if not file.is_file():
            raise DataError(f"{file} is missing; {settings.name} says {ranks} ranks")
    return files


def export(source: Path, target: Path) -> Path:
    """Write the model of a checkpoint as a Hugging Face folder, in bfloat16.

    Args:
        source: see `checkpoint_folder`.
        target: folder to make.

    Returns:
        The checkpoint that was used.

    Raises:
        DataError: no checkpoint, an incomplete one, or one that holds more than tensors.
        EnvironmentCheckError: the target exists, cannot be written, or the disk is too small.
    """
    checkpoint = checkpoint_folder(source)
    shards = shard_files(checkpoint)
    target = target.absolute()
    if target.exists():
        raise EnvironmentCheckError(f"{target} exists already; choose another folder")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise EnvironmentCheckError(f"{target}: no permission to write to {existing}")
    # Shards may be float32; what is written takes half of that at most.
    needed, free = sum(file.stat().st_size for file in shards), shutil.disk_usage(existing).free
    if free < needed:
        raise EnvironmentCheckError(f"{target}: {free >> 20} MiB free; need {needed >> 20} MiB")
    with quiet_imports():
        from hpo_verl.verl_plugin import merge

    merge.check_shards(shards)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        merge.merge(checkpoint, partial)
        partial.chmod(0o755)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint
