"""Whether disks, folders, shared memory and ports are as a run needs them."""

from __future__ import annotations

import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hpo_verl.checks.finding import Finding, attempt, error, ok, skipped, warning
from hpo_verl.checks.memory import ACTOR, GIB, ROLLOUT
from hpo_verl.checks.model_folders import KEY as POLICY_KEY
from hpo_verl.checks.subject import Subject
from hpo_verl.config.prepare import preparations
from hpo_verl.config.settings import cards_a_copy
from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.runs.process import SHARED_MEMORY

# Bytes a parameter of what verl saves, all in float32 at most: of each copy that cards share,
# and once.
SAVED_BYTES = {"model": 4, "optimizer": 8}
SAVED_ONCE_BYTES = {"hf_model": 4}
FREE_DISK_BYTES = 1 << 30
DISK_FIX = (
    "free some, another hydra.run.dir or trainer.default_local_dir (HPO_VERL_CHECKPOINTS), or a "
    "smaller trainer.max_actor_ckpt_to_keep"
)
LOOPBACK = "127.0.0.1"


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    # Path.exists raises where a folder above may not be entered.
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))


def written_folders(subject: Subject) -> Iterator[tuple[str, Path]]:
    """What a run writes, and where."""
    yield "run folder", subject.run_folder
    yield "trainer.default_local_dir", subject.checkpoint_folder


def check_paths(subject: Subject) -> list[Finding]:
    """Whether paths mean the same on every machine; nothing where there is one machine."""
    if not subject.several_machines:
        return []
    for key, path in _shared_paths(subject):
        if not path.startswith(("/", "~")):
            return [
                error(
                    "paths",
                    f"{key}={path}: must be absolute; the processes of a cluster have other "
                    "working folders",
                    f"{key}=/an/absolute/path on a disk that all machines share",
                )
            ]
    return [
        warning(
            "paths",
            "all are absolute; whether all machines share their disks was not checked",
            "put data, models and checkpoints on a disk that all machines see",
        )
    ]


def _shared_paths(subject: Subject) -> Iterator[tuple[str, str]]:
    """Key and path of all that every machine reads or writes."""
    yield "hydra.run.dir", str(subject.run_folder)
    yield from ((key, str(path)) for key, path in subject.data_files)
    for made in preparations(subject.config):
        yield f"prepare.{made.name}.output", str(made.output)
    for key in ("trainer.default_local_dir", "reward.custom_reward_function.path", POLICY_KEY):
        value = str(subject.get(key, ""))
        if value and not value.startswith("pkg://"):
            yield key, value


def check_folders(subject: Subject) -> Finding:
    """Whether the folders can be made and written."""
    for what, folder in written_folders(subject):
        existing = nearest_existing(folder)
        if not existing.is_dir():
            return error("folders", f"{what} {folder}: {existing} is not a folder", "another path")
        try:
            # Only the system knows; the file has no name, and is gone at once.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as problem:
            reason = problem.strerror or type(problem).__name__
            return error(
                "folders",
                f"{what} {folder}: {existing} cannot be written to ({reason})",
                "another path, or the permission of its owner",
            )
    shown = ", ".join(f"{what} {folder}" for what, folder in written_folders(subject))
    return ok("folders", f"{shown}: writable")


def check_disk(subject: Subject) -> Finding:
    """Compare what a run writes with the free disk: logs, and the checkpoints of the policy."""
    folder, size = subject.checkpoint_folder, subject.size
    every = subject.get("trainer.save_freq", -1)
    unknown = size is None and every > 0
    small = [("run folder", subject.run_folder)]
    small += [("trainer.default_local_dir", folder)] if unknown else []
    for what, written in small:
        free = shutil.disk_usage(nearest_existing(written)).free
        if free < FREE_DISK_BYTES:
            text = f"{what} {written}: {free >> 20} MiB free; need {FREE_DISK_BYTES >> 20} MiB"
            return error("disk", text, DISK_FIX)
    if unknown:
        return skipped("disk", "the dimensions of the policy are unknown")
    free = shutil.disk_usage(nearest_existing(folder)).free
    contents = subject.get(f"{ACTOR}.checkpoint.save_contents", ["model", "optimizer", "extra"])
    copies = subject.get("trainer.nnodes") * subject.get("trainer.n_gpus_per_node")
    copies //= cards_a_copy(subject.config)
    each = sum(
        copies * SAVED_BYTES.get(str(name), 0) + SAVED_ONCE_BYTES.get(str(name), 0)
        for name in contents
    )
    parameters = size.parameters if size else 0
    count = _checkpoints_at_once(subject) if every > 0 else 0
    needed = count * each * parameters + FREE_DISK_BYTES
    text = (
        f"{needed / GIB:.1f} GiB for checkpoints ({count} x {each} bytes x {parameters:,} "
        f"parameters) and logs; {free / GIB:.1f} GiB free at {folder}"
    )
    if needed > free:
        return error("disk", text, DISK_FIX)
    return ok("disk", text)


def _checkpoints_at_once(subject: Subject) -> int:
    """How many checkpoints lie on the disk at worst: those kept, and one being written."""
    steps, every = subject.get("trainer.total_training_steps"), subject.get("trainer.save_freq")
    kept = subject.get("trainer.max_actor_ckpt_to_keep", math.inf)
    written = math.ceil(steps / every) if steps else math.inf
    count = min(written, kept + 1)
    # Without an end and without a limit there is no figure; one is the least.
    return int(count) if math.isfinite(count) else 1


def check_shared_memory(subject: Subject) -> Finding:
    """Whether /dev/shm takes Ray's object store and the transfer of weights to the rollouts."""
    name = "shared memory"
    if not SHARED_MEMORY.is_dir():
        return skipped(name, f"there is no {SHARED_MEMORY}")
    free = shutil.disk_usage(SHARED_MEMORY).free
    store = subject.get("ray_kwargs.ray_init.object_store_memory", 0)
    bucket = subject.get(f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes", 0)
    # On cards verl hands weights over by CUDA's own means.
    ranks = subject.get("trainer.n_gpus_per_node", 1) if subject.on_cpu else 0
    needed = ranks * bucket << 20
    fix = f"enlarge {SHARED_MEMORY}; in Docker --shm-size=64g"
    if free < store:
        return error(
            name,
            f"ray_kwargs.ray_init.object_store_memory={store}: {SHARED_MEMORY} has only "
            f"{free / GIB:.1f} GiB free",
            fix,
        )
    text = (
        f"{needed / GIB:.2f} GiB for the weights ({ranks} x {bucket} MiB); "
        f"{free / GIB:.1f} GiB of {SHARED_MEMORY} free"
    )
    return error(name, text, fix) if needed > free else ok(name, text)


def check_ports(subject: Subject) -> Finding:
    """Whether the ports that the configuration fixes are free, and what RAY_ADDRESS would do."""
    elsewhere = os.environ.get("RAY_ADDRESS")
    if elsewhere:
        return warning(
            "ports",
            f"RAY_ADDRESS={elsewhere}: Ray would join that cluster instead of starting here",
            "unset RAY_ADDRESS, or give --address",
        )
    fixed = _fixed_ports(subject)
    if subject.get(f"{ROLLOUT}.prometheus.enable", False):
        fixed[f"{ROLLOUT}.prometheus.port"] = subject.get(f"{ROLLOUT}.prometheus.port")

    def look() -> str:
        for key, port in fixed.items():
            _check_port(key, port)
        # Port 0 lets the system choose: it fails only where loopback cannot be bound at all.
        _check_port(LOOPBACK, 0)
        chosen = ", ".join(f"{key}={port}" for key, port in fixed.items()) or "none is fixed"
        return f"{chosen}; the others are chosen among free ones at the start"

    return attempt("ports", look, "another port, or end the program that has it")


def _fixed_ports(subject: Subject) -> dict[str, int]:
    """Key -> port of every port of Ray that the configuration fixes."""
    return {
        f"ray_kwargs.ray_init.{key}": value
        for key, value in subject.get("ray_kwargs.ray_init", {}).items()
        if str(key).endswith("port") and isinstance(value, int) and value > 0
    }


def _check_port(key: str, port: int) -> None:
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
            probe.bind((LOOPBACK, port))
        except OSError as problem:
            raise EnvironmentCheckError(f"{key}={port}: the port is taken") from problem
