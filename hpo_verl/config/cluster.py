"""What is different where a run joins a Ray cluster instead of starting its own.

A run joins the cluster that `ray_kwargs.ray_init.address` or the environment
variable RAY_ADDRESS names; Ray sets the latter in every job that is submitted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from hpo_verl.config.environment import FOLDERS
from hpo_verl.config.recipes import recipes_directory
from hpo_verl.config.redaction import masked

# Arguments of ray.init that only a new cluster takes; Ray refuses most of them when it joins one.
START_ONLY = (
    *("num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "include_dashboard"),
    *("dashboard_host", "dashboard_port", "_node_name", "_system_config", "_temp_dir"),
)
# Ray sets this variable for every job that was submitted.
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# What a cluster's workers cannot inherit from the driver's environment.
FORWARDED = (
    *("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR", "WANDB_DIR", "SWANLAB_LOG_DIR"),
    *("MLFLOW_TRACKING_URI", "VERL_PLATFORM", "HF_HUB_OFFLINE"),
    # One of them resolves the recipe.
    *FOLDERS,
)
# The interfaces between machines: NCCL_SOCKET_IFNAME, NCCL_IB_HCA and the like.
NETWORK_PREFIX, GLOO_INTERFACE = "NCCL_", "GLOO_SOCKET_IFNAME"
# Folders of the submitting machine that recipes read from the environment.
FOLDER_VARIABLES = (*FOLDERS, "HF_HOME")
THREADS, AUTO = "OMP_NUM_THREADS", "auto"


def joined_address(config: DictConfig) -> str | None:
    """Address of the Ray cluster that the run joins; None where it starts its own."""
    given = OmegaConf.select(config, "ray_kwargs.ray_init.address")
    address = str(given or os.environ.get("RAY_ADDRESS") or "local")
    return None if address == "local" else address


def stop_signals() -> Sequence[signal.Signals]:
    """Signals that ask a run to stop after its step.

    Ray stops a job by SIGTERM to all of its processes, and by SIGKILL after 3 s
    (RAY_JOB_STOP_WAIT_TIME_S of the cluster): too early for a checkpoint.
    """
    return (signal.SIGINT,) if IN_JOB in os.environ else (signal.SIGINT, signal.SIGTERM)


def join(config: DictConfig) -> None:
    """Where a run joins a cluster, drop the settings that would start one."""
    ray_init = OmegaConf.select(config, "ray_kwargs.ray_init")
    if ray_init is None or joined_address(config) is None:
        return
    with open_dict(config):
        for key in START_ONLY:
            ray_init.pop(key, None)


def _network_variables() -> dict[str, str]:
    """What this process's environment says of the interfaces of NCCL and gloo."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(NETWORK_PREFIX) or name == GLOO_INTERFACE
    }


def forward_environment(config: DictConfig) -> None:
    """Give this process's settings for verl's workers to Ray, which takes them to every node.

    Settings of NCCL and gloo in the configuration win. `OMP_NUM_THREADS=auto` becomes the
    number of CPUs that this process may use.
    """
    key = "ray_kwargs.ray_init.runtime_env.env_vars"
    configured = OmegaConf.select(config, key) or {}
    network = _network_variables()
    variables = {name: network[name] for name in network.keys() - configured.keys()}
    given = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    # An address may hold a password, which Ray's dashboard would show.
    variables |= {name: value for name, value in given.items() if masked(value) == value}
    if configured.get(THREADS) == AUTO:
        variables[THREADS] = str(len(os.sched_getaffinity(0)))
    with open_dict(config):
        OmegaConf.update(config, key, variables, merge=True, force_add=True)
    # A job's own runtime environment may name the same variables; Ray would refuse that.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")


def job_runtime_env() -> dict[str, Any]:
    """Ray's runtime environment of a job: this package's code and recipes, and its variables.

    `recipes/ray/runtime_env.yaml` says which files Ray uploads.
    """
    settings = OmegaConf.load(recipes_directory() / "ray" / "runtime_env.yaml")
    folders = {name: os.environ[name] for name in FOLDER_VARIABLES if name in os.environ}
    return {
        "working_dir": str(Path(__file__).resolve().parents[2]),
        "excludes": list(settings.excludes),
        "env_vars": {
            **settings.env_vars,
            **_network_variables(),
            **{name: str(Path(path).expanduser().absolute()) for name, path in folders.items()},
        },
    }
