"""`hpo-verl train`: from a recipe's name to a trained policy."""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from hpo_verl.checks.list import check_quickly, make_and_check
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.child import module_arguments
from hpo_verl.config import cluster
from hpo_verl.config.environment import complete_environment
from hpo_verl.config.overrides import (
    RUN_FOLDER_KEY,
    names_run_folder,
    setting,
    without_run_folder,
)
from hpo_verl.config.recipes import hydra_arguments, recipe_file
from hpo_verl.config.redaction import secret_mask
from hpo_verl.errors import TrainingFailed, TrainingStopped
from hpo_verl.launch import outputs
from hpo_verl.launch.progress import NoProgress, ProgressBound
from hpo_verl.launch.resume import (
    FLAG,
    METRICS_NAME,
    METRICS_VARIABLE,
    begin,
    latest_run,
    logger_paths,
    place_checkpoints,
    refuse_used_folder,
)
from hpo_verl.runs.checkpoints import TRACKER
from hpo_verl.runs.files import locked
from hpo_verl.runs.metrics import MetricsFile
from hpo_verl.runs.process import ChildProcess
from hpo_verl.runs.stop import GracefulStop, stage_message, stop_message

NO_PROGRESS_KEY = "trainer.guard.max_seconds_without_progress"
STARTING = "starting Ray"
LOG_NAME = "train.log"


def environment(config: DictConfig, folder: Path, temporary: Path) -> dict[str, str]:
    """Environment variables of verl's processes, for a run's folder and temporary folder."""
    variables = {
        **logger_paths(folder),
        # This process reads them.
        METRICS_VARIABLE: str(folder / METRICS_NAME),
        "HYDRA_FULL_ERROR": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    on_cpu = config.trainer.device == "cpu"
    if on_cpu:
        variables |= {"VERL_PLATFORM": "cpu", "HF_HUB_OFFLINE": "1"}
    if cluster.joined_address(config) is not None:
        return variables
    # verl leaves lock files where temporary files go. Ray finds the cluster of this machine
    # there too, so a run that joins one keeps the machine's own folder.
    variables["TMPDIR"] = str(temporary)
    if on_cpu:
        variables |= {
            # Ray's own switch, named after the systems where it is the default: one
            # node, and every server on loopback.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # torch's own store would listen on all interfaces.
            "DIST_INIT_METHOD": f"file://{temporary}/process_group",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if not OmegaConf.select(config, "ray_kwargs.timeline_json_file"):
            # Events of tasks, which only the dashboard and the timeline show, make Ray's
            # gcs_server grow by several MiB per 100 steps.
            variables["RAY_task_events_report_interval_ms"] = "0"
    return variables


def stopped_message(recipe: str, overrides: Sequence[str], config: DictConfig, folder: Path) -> str:
    """The checkpoint that a stopped run left, and the command that continues it."""
    checkpoints = Path(config.trainer.default_local_dir)
    step = (checkpoints / TRACKER).read_text().strip()
    command = ["hpo-verl", "train", recipe, FLAG, *without_run_folder(overrides)]
    command.append(setting(RUN_FOLDER_KEY, str(folder)))
    return (
        f"stopped after step {step}; checkpoint: {checkpoints / f'global_step_{step}'}\n"
        f"go on with: {shlex.join(command)}"
    )


def train(
    recipe: str,
    overrides: Sequence[str],
    announce: Callable[[str], None] = print,
    on_poll: Callable[[DictConfig, MetricsFile, str], None] = lambda config, metrics, doing: None,
    resume: bool = False,
) -> Path:
    """Train as a recipe says, and collect what the run leaves; return its folder.

    `announce` is told what happens, one line each; `on_poll` is called about three times a second
    with the metrics so far and what the run is doing. With `resume` the run continues from the
    newest whole checkpoint of the named, or else the last, run.

    Raises:
        HpoVerlError: wrong input, found before Ray starts.
        TrainingFailed: verl ended with an error, an actor or node of the run died, or the run
            made no progress for longer than permitted.
        TrainingStopped: Ctrl-C or SIGTERM ended the run, with a checkpoint.
    """
    complete_environment()
    planned = PlannedRun(recipe, tuple(overrides))
    remarks = check_quickly(planned)
    overrides, folder = planned.hydra_overrides, planned.run_folder
    if not resume:
        refuse_used_folder(folder)
    elif not names_run_folder(overrides):
        folder = latest_run(folder.parent)
        planned = replace(planned, given_folder=folder, composed=planned.whole)
    config = planned.config
    settings = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    # It imports verl while this process does, and then waits.
    child = ChildProcess(
        module_arguments("hpo_verl.verl_plugin.main"),
        functools.partial(environment, config, folder),
        secret_mask(os.environ, settings),
    )
    with child:
        remarks += make_and_check(planned, announce)
        for remark in dict.fromkeys(remarks):
            announce(remark)
        with locked(folder):
            place_checkpoints(config, folder)
            start = begin(config, folder, sys.argv, resume, announce)
            arguments = [
                *hydra_arguments(recipe),
                *without_run_folder(overrides),
                setting(RUN_FOLDER_KEY, str(folder)),
                setting("++ray_kwargs.ray_init._temp_dir", str(child.temporary)),
            ]
            if start is not None:
                arguments += ["trainer.resume_mode=resume_path"]
                arguments += [setting("trainer.resume_from_path", str(start.path))]
            metrics = MetricsFile(folder / METRICS_NAME)
            # Earlier starts have shown their rows.
            metrics.read_new()
            started = time.monotonic()
            announce(f"run folder {folder} (full output: {LOG_NAME})")
            if _run(child, arguments, config, folder, metrics, announce, on_poll):
                raise TrainingStopped(stopped_message(recipe, overrides, config, folder))
            metrics.read_new()
            seconds = time.monotonic() - started
            summary = outputs.write_summary(folder, config, metrics, seconds)
            name, seed = outputs.algorithm_name(config), summary["seed"]
            title = f"{name} on {recipe_file(recipe).stem}, seed {seed}"
            outputs.draw_curve(folder, metrics, title)
            outputs.make_policy(folder, announce)
            return folder


def _run(
    child: ChildProcess,
    arguments: Sequence[str],
    config: DictConfig,
    folder: Path,
    metrics: MetricsFile,
    announce: Callable[[str], None],
    on_poll: Callable[[DictConfig, MetricsFile, str], None],
) -> bool:
    """Send verl its arguments and wait for its end; whether it was stopped early."""
    log_file = folder / LOG_NAME
    bound = ProgressBound(OmegaConf.select(config, NO_PROGRESS_KEY), NO_PROGRESS_KEY)
    stage = stage_message(folder)
    stage.create()

    def poll() -> None:
        doing = stage.read() or STARTING
        on_poll(config, metrics, doing)
        bound.check(doing, len(metrics.rows))
        stop.on_poll()

    try:
        with GracefulStop(stop_message(folder), announce, cluster.stop_signals()) as stop:
            child.go(log_file, json.dumps(arguments))
            code = child.wait(poll)
    except NoProgress as error:
        raise TrainingFailed(f"{error}\nfull output: {log_file}") from error
    finally:
        stage.remove()
    if code != 0:
        raise TrainingFailed(
            f"training ended with exit code {code}: {child.failure()}\nfull output: {log_file}"
        )
    return stop.stopped
