"""Where a run starts: from nothing, or from a checkpoint that is whole and its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from hpo_verl.config.settings import leaves
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.launch.manifest import CONFIG_NAME, checked_manifest, write_manifest
from hpo_verl.runs import checkpoints
from hpo_verl.runs.files import write_atomically

FLAG = "--resume"
METRICS_NAME, METRICS_VARIABLE = "metrics.jsonl", "VERL_FILE_LOGGER_PATH"
# They say where a run starts, not what it computes.
RESUME_KEYS = ("trainer.resume_mode", "trainer.resume_from_path")


def logger_paths(folder: Path) -> dict[str, str]:
    """Environment variables that tell verl's loggers where to write; what is set already stays.

    Without them some write into the working folder, and MLflow into a file that all users share.
    """
    places = {
        METRICS_VARIABLE: str(folder / METRICS_NAME),
        "TENSORBOARD_DIR": str(folder / "tensorboard"),
        # W&B makes a folder `wandb` in it.
        "WANDB_DIR": str(folder),
        "SWANLAB_LOG_DIR": str(folder / "swanlog"),
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }
    return {name: os.environ.get(name) or place for name, place in places.items()}


def place_checkpoints(config: DictConfig, folder: Path) -> None:
    """Let verl write checkpoints to the run's folder, where the configuration says nothing.

    verl takes `~` for the name of a folder, so it is replaced here.
    """
    given = config.trainer.default_local_dir or folder / checkpoints.FOLDER_NAME
    with open_dict(config):
        config.trainer.default_local_dir = str(Path(given).expanduser().absolute())


def _holds_run(folder: Path) -> bool:
    """Whether a folder holds metrics or checkpoints, which another run would overwrite."""
    metrics = folder / METRICS_NAME
    written = metrics.is_file() and metrics.stat().st_size > 0
    return written or checkpoints.holds_checkpoints(folder / checkpoints.FOLDER_NAME)


def refuse_used_folder(folder: Path) -> None:
    """Refuse with a ConfigError to start a run from nothing where there is one."""
    if _holds_run(folder):
        raise ConfigError(
            f"run folder {folder} holds a run: {FLAG} goes on with it; for a new run, choose "
            "another folder with hydra.run.dir="
        )


def latest_run(runs: Path) -> Path:
    """The run among a recipe's folders that wrote metrics or a checkpoint last."""

    def last_written(run: Path) -> float:
        files = (run / METRICS_NAME, run / checkpoints.FOLDER_NAME / checkpoints.TRACKER)
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    found = [path for path in runs.glob("*") if _holds_run(path)]
    if not found:
        raise ConfigError(f"{FLAG}: no run in {runs}; name its folder with hydra.run.dir=")
    return max(found, key=last_written)


def _starting_point(config: DictConfig, resume: bool) -> checkpoints.Chosen | None:
    """The checkpoint that a run continues from; None for a run from nothing."""
    mode = config.trainer.get("resume_mode")
    if resume and mode != "auto":
        raise ConfigError(f"{FLAG} chooses the checkpoint: leave out trainer.resume_mode={mode}")
    if mode == "resume_path":
        path = Path(str(config.trainer.resume_from_path)).expanduser().absolute()
        step = checkpoints.step_of(path)
        if step is None or not path.is_dir():
            raise DataError(f"trainer.resume_from_path={path}: not a folder global_step_N")
        wrong = checkpoints.fault(path)
        if wrong:
            raise DataError(f"trainer.resume_from_path={path}: the checkpoint is {wrong}")
        return checkpoints.Chosen(path, step, ())
    folder = Path(config.trainer.default_local_dir)
    if resume or (mode == "auto" and checkpoints.holds_checkpoints(folder)):
        return checkpoints.choose(folder)
    return None


def _changed_settings(before: str, now: str) -> list[str]:
    """What differs between two `config.yaml`, as `key: before -> now`."""
    old, new = (
        dict(leaves(OmegaConf.to_container(OmegaConf.create(text)))) for text in (before, now)
    )
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent") and key not in RESUME_KEYS
    ]


def cut_metrics(path: Path, step: int) -> None:
    """Remove the rows after a step, and a last line that a kill has torn.

    Raises:
        DataError: a line before the last is no row of metrics.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            row_step = int(json.loads(line)["step"])
        except (ValueError, LookupError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}: line {number} is no row of metrics ({error})") from error
        if row_step <= step:
            kept.append(line)
    write_atomically(path, b"".join(kept))


def begin(
    config: DictConfig,
    folder: Path,
    command: Sequence[str],
    resume: bool,
    announce: Callable[[str], None],
) -> checkpoints.Chosen | None:
    """Check and record a run that is about to start, from nothing or from a checkpoint.

    Args:
        config: the resolved configuration, without Hydra's own part. Where the run continues,
            `trainer.resume_mode` and `resume_from_path` are set to the checkpoint.
        folder: the run's folder, which exists.
        command: the command line, for the manifest.
        resume: whether the run must continue from a checkpoint.
        announce: told what is left out, what has changed and where the run continues.

    Returns:
        The checkpoint that the run continues from.

    Raises:
        ConfigError: `trainer.resume_mode` says something else than `--resume`.
        DataError: the checkpoints are another run's or another user's, or none is whole. Nothing
            is written then.
    """
    text, manifest = checked_manifest(config, command)
    saved = Path(config.trainer.default_local_dir)
    start = _starting_point(config, resume)
    if start is not None:
        for fault in start.left_out:
            announce(f"not used: {fault}")
        before = folder / CONFIG_NAME
        if before.is_file():
            for change in _changed_settings(before.read_text(), text):
                announce(f"changed since the last start: {change}")
        announce(f"going on after step {start.step}, from {start.path}")
        cut_metrics(folder / METRICS_NAME, start.step)
        if start.path.parent == saved:
            # verl's own note may be torn, and is read later.
            write_atomically(saved / checkpoints.TRACKER, str(start.step))
        with open_dict(config):
            config.trainer.resume_mode = "resume_path"
            config.trainer.resume_from_path = str(start.path)
    write_manifest(folder, saved, text, manifest)
    return start
