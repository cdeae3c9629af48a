"""What is different where a run joins a Ray cluster instead of starting its own.

A run joins the cluster that `ray_kwargs.ray_init.address` or the environment
variable RAY_ADDRESS names; Ray sets the latter in every job that is submitted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.launch.checks import data_files
from hpo_verl.launch.prepare import preparations

# Arguments of ray.init that only a new cluster takes; Ray refuses most of them when it joins one.
START_ONLY = (
    "num_cpus",
    "num_gpus",
    "resources",
    "labels",
    "object_store_memory",
    "include_dashboard",
    "dashboard_host",
    "dashboard_port",
    "_node_name",
    "_system_config",
    "_temp_dir",
)
# Ray sets this variable for every job that was submitted.
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# What a cluster's workers cannot inherit from the driver's environment.
FORWARDED = ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR", "VERL_PLATFORM", "HF_HUB_OFFLINE")
# The interfaces between machines: NCCL_SOCKET_IFNAME, NCCL_IB_HCA and the like.
NETWORK_PREFIX, GLOO_INTERFACE = "NCCL_", "GLOO_SOCKET_IFNAME"
THREADS, AUTO = "OMP_NUM_THREADS", "auto"
# verl reserves this many of Ray's CPUs for every rank (max_colocate_count).
CPUS_PER_RANK = 3
# TransferQueue's controller, and one that is free to place further actors with.
FURTHER_CPUS = 2


def joins_cluster(config: DictConfig) -> bool:
    """Whether the run uses a Ray cluster that is already there."""
    address = OmegaConf.select(config, "ray_kwargs.ray_init.address")
    return (address or os.environ.get("RAY_ADDRESS") or "local") != "local"


def stop_signals() -> Sequence[signal.Signals]:
    """Signals that ask a run to stop after its step.

    Ray stops a job by SIGTERM to all of its processes, and by SIGKILL after 3 s
    (RAY_JOB_STOP_WAIT_TIME_S of the cluster): too early for a checkpoint.
    """
    return (signal.SIGINT,) if IN_JOB in os.environ else (signal.SIGINT, signal.SIGTERM)


def join(config: DictConfig) -> None:
    """Where a run joins a cluster, drop the settings that would start one."""
    ray_init = OmegaConf.select(config, "ray_kwargs.ray_init")
    if ray_init is None or not joins_cluster(config):
        return
    with open_dict(config):
        for key in START_ONLY:
            ray_init.pop(key, None)


def network_variables() -> dict[str, str]:
    """What this process's environment says of the interfaces of NCCL and gloo."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(NETWORK_PREFIX) or name == GLOO_INTERFACE
    }


def forward_environment(config: DictConfig) -> None:
    """Give this process's settings for verl's workers to Ray, which takes them to every node.

    What the configuration itself says of NCCL and gloo stays. `OMP_NUM_THREADS=auto`
    becomes the number of CPUs that this process may use.
    """
    key = "ray_kwargs.ray_init.runtime_env.env_vars"
    configured = OmegaConf.select(config, key) or {}
    network = network_variables()
    variables = {name: network[name] for name in network.keys() - configured.keys()}
    variables |= {name: os.environ[name] for name in FORWARDED if name in os.environ}
    if configured.get(THREADS) == AUTO:
        variables[THREADS] = str(len(os.sched_getaffinity(0)))
    with open_dict(config):
        OmegaConf.update(config, key, variables, merge=True, force_add=True)
    # A job's own runtime environment may name the same variables; Ray would refuse that.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")


def cards_a_copy(config: DictConfig) -> int:
    """Cards over which FSDP shards one copy of weights, gradients and moments."""
    cards = config.trainer.nnodes * config.trainer.n_gpus_per_node
    size = OmegaConf.select(config, "actor_rollout_ref.actor.fsdp_config.fsdp_size") or -1
    return cards if size < 1 else min(size, cards)


def check_absolute(config: DictConfig, run_folder: str) -> None:
    """Check that no path depends on the folder that a job happens to run in.

    Args:
        config: the composed recipe.
        run_folder: `hydra.run.dir` as it was given.

    Raises:
        ConfigError: names the key and the path.
    """
    for key, path in (("hydra.run.dir", run_folder), *_paths(config)):
        if not path.startswith(("/", "~")):
            raise ConfigError(
                f"{key}={path}: must be absolute, on a disk that all nodes see; "
                "a Ray job runs in a temporary folder of its own"
            )


def _paths(config: DictConfig) -> Iterator[tuple[str, str]]:
    yield from ((key, str(path)) for key, path in data_files(config))
    yield from ((f"prepare.{p.name}.output", str(p.output)) for p in preparations(config))
    for key in ("trainer.default_local_dir", "reward.custom_reward_function.path"):
        value = OmegaConf.select(config, key)
        if value and not str(value).startswith("pkg://"):
            yield key, str(value)
    yield "actor_rollout_ref.model.path", str(config.actor_rollout_ref.model.path)


def check_resources(config: DictConfig, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Check that a cluster has the GPUs and CPUs that verl will reserve.

    verl waits without a word for CPUs that never come.

    Args:
        config: the composed recipe.
        nodes: Ray's total resources of each living node.

    Raises:
        EnvironmentCheckError: names what is needed and what is there.
    """
    wanted_nodes, ranks = config.trainer.nnodes, config.trainer.n_gpus_per_node
    fitting = [
        node
        for node in nodes
        if node.get("GPU", 0) >= ranks and node.get("CPU", 0) >= CPUS_PER_RANK * ranks
    ]
    shown = ", ".join(f"{node.get('GPU', 0):g} GPU {node.get('CPU', 0):g} CPU" for node in nodes)
    if len(fitting) < wanted_nodes:
        raise EnvironmentCheckError(
            f"trainer.nnodes={wanted_nodes} trainer.n_gpus_per_node={ranks}: needs "
            f"{wanted_nodes} node(s) with {ranks} GPU and {CPUS_PER_RANK * ranks} CPU each; "
            f"the cluster has: {shown or 'no node'}"
        )
    units = OmegaConf.select(
        config, "transfer_queue.backend.SimpleStorage.num_data_storage_units", default=0
    )
    needed = CPUS_PER_RANK * ranks * wanted_nodes + units + FURTHER_CPUS
    if sum(node.get("CPU", 0) for node in nodes) < needed:
        raise EnvironmentCheckError(
            f"the run reserves {needed} of Ray's CPUs ({CPUS_PER_RANK} a rank, {units} for "
            "transfer_queue.backend.SimpleStorage.num_data_storage_units, "
            f"{FURTHER_CPUS} more); the cluster has: {shown}"
        )
