"""`hpo-verl train`: from a recipe's name to a trained policy."""

from __future__ import annotations

import functools
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from hpo_verl.errors import HpoVerlError
from hpo_verl.launch import checks, cluster, outputs, resume
from hpo_verl.launch.checkpoints import TRACKER
from hpo_verl.launch.code_origin import own_files
from hpo_verl.launch.export import make_policy
from hpo_verl.launch.lock import locked
from hpo_verl.launch.metrics import MetricsFile
from hpo_verl.launch.prepare import check_made, make_missing, missing
from hpo_verl.launch.process import ProcessLost, TrainingProcess
from hpo_verl.launch.quiet import quiet_imports
from hpo_verl.launch.recipes import compose_resolved, recipes_directory
from hpo_verl.launch.stop import GracefulStop, StopFile
from hpo_verl.launch.text_mask import secret_mask

RUN_FOLDER_KEY = "hydra.run.dir"
RUNS = Path("runs")


class TrainingFailed(HpoVerlError, RuntimeError):
    """verl's process ended with an error."""


class TrainingStopped(HpoVerlError):
    """The run ended early, with a checkpoint, because it was asked to."""


@dataclass(frozen=True)
class Finished:
    """What a finished run tells its user.

    Attributes:
        folder: the run's folder.
        summary: content of `summary.json`.
        curve: the picture.
        policy: folder of the trained policy; None if there is none, see `make_policy`.
    """

    folder: Path
    summary: dict[str, object]
    curve: Path
    policy: Path | None


def named_folder(overrides: Sequence[str]) -> Path | None:
    """Folder of a run where `hydra.run.dir=PATH` names it."""
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key == RUN_FOLDER_KEY:
            return Path(value.strip("'\"")).expanduser().absolute()
    return None


def run_folder(recipe: str, overrides: Sequence[str]) -> Path:
    """Folder of a new run: `hydra.run.dir=PATH`, or `runs/<recipe>/<time>` here."""
    return (
        named_folder(overrides)
        or (RUNS / recipe / f"{datetime.now():%Y-%m-%d_%H-%M-%S}").absolute()
    )


def quoted(value: str) -> str:
    """A text as a value of a Hydra override, whatever letters it holds."""
    return "'" + value.replace("'", "\\'") + "'"


def environment(config: DictConfig, folder: Path, temporary: Path) -> dict[str, str]:
    """Environment variables of verl's processes.

    Args:
        config: the composed recipe.
        folder: the run's folder.
        temporary: the run's private temporary folder.
    """
    variables = {
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        "TENSORBOARD_DIR": str(folder / "tensorboard"),
        "HYDRA_FULL_ERROR": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not cluster.joins_cluster(config):
        # verl leaves lock files where temporary files go, which is also where Ray finds
        # the cluster of this machine.
        variables["TMPDIR"] = str(temporary)
    if config.trainer.device == "cpu":
        variables |= {"VERL_PLATFORM": "cpu", "HF_HUB_OFFLINE": "1"}
    if config.trainer.device == "cpu" and not cluster.joins_cluster(config):
        variables |= {
            # Ray's own switch, named after the systems where it is the default: one
            # node, and every server on loopback.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # torch's own store would listen on all interfaces.
            "DIST_INIT_METHOD": f"file://{temporary}/process_group",
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        }
        if not OmegaConf.select(config, "ray_kwargs.timeline_json_file"):
            # Events of tasks, which only the dashboard and the timeline show, make Ray's
            # gcs_server grow by several MiB per 100 steps.
            variables["RAY_task_events_report_interval_ms"] = "0"
    return variables


def compose_alone(recipe: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a recipe and check what needs neither its files nor verl.

    Raises:
        HpoVerlError: names the key, its value and what is permitted.
    """
    checks.check_versions()
    config = compose_resolved(recipe, overrides)
    cluster.join(config)
    checks.check_numbers(config)
    checks.check_engine_package(config)
    return config


def check_with_verl(config: DictConfig) -> None:
    """Let verl check a configuration; its import takes seconds, so this comes late.

    Raises:
        ConfigError: names the section and verl's complaint.
    """
    if config.trainer.device == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"
    with quiet_imports():
        from hpo_verl.verl_plugin import preflight

        preflight.check_with_verl(config)


def compose_and_check(
    recipe: str, overrides: Sequence[str], announce: Callable[[str], None]
) -> DictConfig:
    """Compose a recipe, make what it needs and is missing, and check all of it.

    Args:
        recipe: name of a recipe.
        overrides: Hydra overrides.
        announce: told what is being made.

    Returns:
        The configuration without Hydra's own part.

    Raises:
        HpoVerlError: names the key or file, its value and what is permitted.
    """
    config = compose_alone(recipe, overrides)
    if untested := checks.untested_verl():
        announce(untested)
    for text in own_files(config):
        announce(text)
    if not missing(config):
        checks.check_files(config)
    check_with_verl(config)
    checks.check_machine(config)
    if missing(config):
        make_missing(config, announce)
        checks.check_files(config)
    check_made(config)
    return config


def stopped_message(recipe: str, overrides: Sequence[str], config: DictConfig, folder: Path) -> str:
    """Where a run that was stopped left its checkpoint, and the command that goes on."""
    checkpoints = Path(config.trainer.default_local_dir)
    step = (checkpoints / TRACKER).read_text().strip()
    kept = [text for text in overrides if not text.lstrip("+").startswith(RUN_FOLDER_KEY)]
    command = ["hpo-verl", "train", recipe, "--resume", *kept, f"{RUN_FOLDER_KEY}={folder}"]
    return (
        f"stopped after step {step}; checkpoint: {checkpoints / f'global_step_{step}'}\n"
        f"go on with: {shlex.join(command)}"
    )


def train(
    recipe: str,
    overrides: Sequence[str],
    announce: Callable[[str], None],
    on_metrics: Callable[[DictConfig, MetricsFile], None],
    go_on: bool = False,
) -> Finished:
    """Train as a recipe says, and collect what the run leaves.

    Args:
        recipe: name of a recipe.
        overrides: Hydra overrides.
        announce: told what happens, one line each.
        on_metrics: called about three times a second with the metrics so far.
        go_on: from the newest whole checkpoint of the named, or else the last, run.

    Returns:
        Where everything is.

    Raises:
        HpoVerlError: wrong input, found before Ray starts.
        TrainingFailed: verl ended with an error, or a process of the run is lost.
        TrainingStopped: Ctrl-C or SIGTERM ended the run, with a checkpoint.
    """
    if go_on:
        folder = named_folder(overrides) or resume.latest_run((RUNS / recipe).absolute())
    else:
        folder = run_folder(recipe, overrides)
        resume.refuse_used_folder(folder)
    checks.check_run_folder(folder)
    config = compose_and_check(recipe, overrides, announce)
    with locked(folder):
        with open_dict(config):
            config.trainer.default_local_dir = str(
                config.trainer.default_local_dir or folder / "checkpoints"
            )
        start = resume.begin(config, folder, sys.argv, go_on, announce)
        metrics = MetricsFile(folder / resume.METRICS_NAME)
        # Those of earlier starts are no news.
        metrics.read_new()
        log_file = folder / resume.LOG_NAME
        announce(f"run folder {folder} (full output: {log_file.name})")
        started = time.monotonic()
        arguments = [
            *("--config-dir", str(recipes_directory()), "--config-name", recipe),
            *(text for text in overrides if not text.lstrip("+").startswith(RUN_FOLDER_KEY)),
            f"{RUN_FOLDER_KEY}={folder}",
        ]
        if start is not None:
            arguments += ["trainer.resume_mode=resume_path"]
            arguments += [f"trainer.resume_from_path={quoted(str(start.path))}"]
        variables = functools.partial(environment, config, folder)
        mask = secret_mask(
            os.environ, cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
        )

        def on_poll() -> None:
            on_metrics(config, metrics)
            stop.on_poll()

        with (
            TrainingProcess(arguments, log_file, variables, mask) as process,
            GracefulStop(StopFile(folder), announce, cluster.stop_signals()) as stop,
        ):
            try:
                code = process.wait(on_poll)
            except ProcessLost as error:
                raise TrainingFailed(f"{error}\nfull output: {log_file}") from error
        seconds = time.monotonic() - started
        if code != 0:
            raise TrainingFailed(
                f"training ended with exit code {code}: {process.failure()}\n"
                f"full output: {log_file}"
            )
        if stop.stopped:
            raise TrainingStopped(stopped_message(recipe, overrides, config, folder))
        metrics.read_new()
        summary = outputs.write_summary(folder, config, metrics, seconds)
        title = f"{outputs.algorithm_name(config)} on {recipe}, seed {summary['seed']}"
        curve = outputs.draw_curve(folder, metrics, title)
        return Finished(
            folder,
            summary,
            curve,
            make_policy(folder, announce),
        )
