"""A checkpoint of verl as a Hugging Face folder: `hpo-verl export`, and a run's `policy/`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
from omegaconf import OmegaConf

from hpo_verl.errors import DataError, EnvironmentCheckError
from hpo_verl.launch.manifest import CONFIG_NAME
from hpo_verl.launch.resume import METRICS_NAME
from hpo_verl.runs.checkpoints import FOLDER_NAME, SEAL, TRACKER, holds_checkpoints, step_folders
from hpo_verl.runs.metrics import MetricsFile
from hpo_verl.runs.quiet import quiet_imports

POLICY_NAME = "policy"


def _checkpoints_of(source: Path) -> Path:
    """Where checkpoints lie: in a folder, below it, or where a run's `config.yaml` says."""
    config = source / CONFIG_NAME
    places = [source, source / FOLDER_NAME]
    if config.is_file():
        try:
            named = OmegaConf.select(OmegaConf.load(config), "trainer.default_local_dir")
        except Exception as error:
            raise DataError(f"{config} cannot be read ({error})") from error
        places += [Path(str(named)).expanduser()] if named else []
    for place in places:
        if holds_checkpoints(place):
            return place
    shown = " or ".join(map(str, dict.fromkeys(places)))
    raise DataError(f"{source}: no checkpoint (global_step_N) in {shown}")


def _last_checkpoint(source: Path) -> Path:
    """The newest whole checkpoint of a folder; of a run's, the newest that it had reached.

    Another start of the same experiment may have continued in the same folder.
    """
    folder = _checkpoints_of(source)
    tracker = folder / TRACKER
    noted = tracker.read_text().strip() if tracker.is_file() else ""
    metrics = MetricsFile(source / METRICS_NAME)
    try:
        metrics.read_new()
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{metrics.path} cannot be read ({error})") from error
    last = metrics.rows[-1][0] if metrics.rows else None
    found = step_folders(folder)
    for step, path in found:
        whole = (path / SEAL).is_file() or noted == str(step)
        if whole and (last is None or step <= last):
            return path
    there = ", ".join(path.name for _, path in found) or "none"
    reached = "" if last is None else f" up to step {last}, the run's last"
    raise DataError(f"{folder} holds no whole checkpoint{reached}; there are: {there}")


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
    actor = _last_checkpoint(source) / "actor"
    if not (actor / "fsdp_config.json").is_file():
        raise DataError(f"{actor.parent} is no FSDP checkpoint: it has no actor/fsdp_config.json")
    return actor


def _shard_files(checkpoint: Path) -> list[Path]:
    """The model shards of all ranks."""
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

    The source is that of `checkpoint_folder`, whose result is returned.

    Raises:
        DataError: no checkpoint, an incomplete one, or one that holds more than tensors.
        EnvironmentCheckError: the target exists or cannot be written; the disk or the memory
            is too small.
    """
    checkpoint = checkpoint_folder(source)
    shards = _shard_files(checkpoint)
    target = target.absolute()
    if target.exists():
        raise EnvironmentCheckError(f"{target} exists already; choose another folder")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise EnvironmentCheckError(f"{target}: no permission to write to {existing}")
    with quiet_imports():
        from hpo_verl.verl_plugin import merge

    disk, memory = merge.needed_bytes(shards)
    for what, free, needed in (
        (f"{target}: disk", shutil.disk_usage(existing).free, disk),
        (f"{checkpoint}: memory", psutil.virtual_memory().available, memory),
    ):
        if free < needed:
            raise EnvironmentCheckError(f"{what}: {free >> 20} MiB free; need {needed >> 20} MiB")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        merge.merge(checkpoint, partial)
        partial.chmod(0o755)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def make_policy(folder: Path, announce: Callable[[str], None]) -> Path | None:
    """Make `policy/` of a finished run, of its last checkpoint; an older one is removed.

    No error here fails the run, whose checkpoint can be exported later: `announce` is told why, and
    the command that makes it. Returns the folder, or None where none was made.
    """
    target = folder / POLICY_NAME
    shutil.rmtree(target, ignore_errors=True)
    try:
        _checkpoints_of(folder)
    except DataError:
        return None
    try:
        export(folder, target)
    except Exception as error:
        announce(f"no {POLICY_NAME}/: {error}; later: hpo-verl export {folder} --out {POLICY_NAME}")
        return None
    return target
