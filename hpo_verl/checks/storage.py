"""Whether disks, folders, shared memory and ports are as a run needs them."""

from __future__ import annotations

import math
import os
import shutil
import socket
import tempfile
from pathlib import Path

from hpo_verl.checks.finding import Finding, error, ok, skipped, warning
from hpo_verl.checks.machine import UNKNOWN_SIZE
from hpo_verl.checks.memory import GIB, adapter_parameters
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.prepare import preparations
from hpo_verl.config.settings import ACTOR, POLICY_KEY, ROLLOUT, cards_a_copy
from hpo_verl.runs.process import SHARED_MEMORY

# Bytes a parameter of what verl saves, all in float32 at most: of each copy that cards share,
# and once.
SAVED_BYTES = {"model": 4, "optimizer": 8}
SAVED_ONCE_BYTES = {"hf_model": 4}
# Of logs.
LEAST_FREE_GIB = 1.0
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


def _free_gib(path: Path) -> float:
    return shutil.disk_usage(nearest_existing(path)).free / GIB


def check_paths(run: PlannedRun) -> list[Finding]:
    """Whether paths mean the same on every machine; nothing where there is one machine."""
    if run.address is None and run.get("trainer.nnodes", 1) == 1:
        return []
    shared = [("hydra.run.dir", run.run_folder), *run.data_files]
    shared += [(f"prepare.{made.name}.output", made.output) for made in preparations(run.config)]
    for key in ("trainer.default_local_dir", "reward.custom_reward_function.path", POLICY_KEY):
        shared.append((key, run.get(key, "/")))
    for key, path in shared:
        if not str(path).startswith(("/", "~", "pkg://")):
            text = f"{key}={path}: must be absolute; a cluster's processes have other folders"
            return [error(text, f"{key}=/an/absolute/path on a disk that all machines share")]
    text = "all are absolute; whether all machines share their disks was not checked"
    return [warning(text, "put data, models and checkpoints on a disk that all machines see")]


def check_folders(run: PlannedRun) -> Finding:
    """Whether the folders can be made and written."""
    written = {"run folder": run.run_folder, "trainer.default_local_dir": run.checkpoint_folder}
    for key in ("trainer.rollout_data_dir", "trainer.validation_data_dir"):
        if folder := run.get(key):
            written[key] = Path(folder)
    for what, folder in written.items():
        existing = nearest_existing(folder)
        if not existing.is_dir():
            return error(f"{what} {folder}: {existing} is not a folder", "another path")
        try:
            # Only the system knows; the file has no name, and is gone at once.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as problem:
            reason = problem.strerror or type(problem).__name__
            text = f"{what} {folder}: {existing} cannot be written to ({reason})"
            return error(text, "another path, or the permission of its owner")
    return ok(f"{', '.join(f'{what} {folder}' for what, folder in written.items())}: writable")


def check_disk(run: PlannedRun) -> Finding:
    """Compare what a run writes with the free disk: logs, and the checkpoints of the policy."""
    folder, count = run.checkpoint_folder, _checkpoints_at_once(run)
    contents = run.get(f"{ACTOR}.checkpoint.save_contents", ["model", "optimizer", "extra"])
    cards = run.get("trainer.nnodes") * run.get("trainer.n_gpus_per_node")
    copies = cards // cards_a_copy(run.config)
    parameters = run.size.parameters if run.size else 0
    adapter = adapter_parameters(run.size, run.config) if run.size else 0
    # A frozen weight has no moments.
    numbers = {"model": parameters + adapter, "optimizer": adapter or parameters}
    each = sum(copies * SAVED_BYTES[c] * number for c, number in numbers.items() if c in contents)
    each += sum(SAVED_ONCE_BYTES.get(c, 0) for c in contents) * parameters
    saved = f"logs and checkpoints ({count} x {each / GIB:.2f} GiB)"
    needs = {run.run_folder: (LEAST_FREE_GIB, "logs")}
    needs[folder] = (LEAST_FREE_GIB + count * each / GIB, saved)
    text = ""
    for path, (needed, what) in needs.items():
        free = _free_gib(path)
        text = f"{needed:.2f} GiB for {what}; {free:.2f} GiB free at {path}"
        if needed > free:
            return error(text, DISK_FIX)
    return skipped(UNKNOWN_SIZE) if count and run.size is None else ok(text)


def _checkpoints_at_once(run: PlannedRun) -> int:
    """How many checkpoints lie on the disk at worst: those kept, and one being written."""
    steps, every = run.get("trainer.total_training_steps"), run.get("trainer.save_freq", -1)
    if every < 1:
        return 0
    kept = run.get("trainer.max_actor_ckpt_to_keep", math.inf)
    count = min(math.ceil(steps / every) if steps else math.inf, kept + 1)
    # Without an end and without a limit there is no figure; one is the least.
    return int(count) if math.isfinite(count) else 1


def check_shared_memory(run: PlannedRun) -> Finding:
    """Whether /dev/shm takes Ray's object store and the transfer of weights to the rollouts."""
    if not SHARED_MEMORY.is_dir():
        return skipped(f"there is no {SHARED_MEMORY}")
    free, fix = _free_gib(SHARED_MEMORY), f"enlarge {SHARED_MEMORY}; in Docker --shm-size=64g"
    store = run.get("ray_kwargs.ray_init.object_store_memory", 0)
    if free < store / GIB:
        text = f"ray_kwargs.ray_init.object_store_memory={store}: {SHARED_MEMORY} has only"
        return error(f"{text} {free:.1f} GiB free", fix)
    bucket = run.get(f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes", 0)
    # On cards verl hands weights over by CUDA's own means.
    ranks = run.get("trainer.n_gpus_per_node", 1) if run.on_cpu else 0
    needed = ranks * bucket / 1024
    text = (
        f"{needed:.2f} GiB for the weights ({ranks} x {bucket} MiB); "
        f"{free:.1f} GiB of {SHARED_MEMORY} free"
    )
    return error(text, fix) if needed > free else ok(text)


def check_ports(run: PlannedRun) -> Finding:
    """Whether the ports that the configuration fixes are free."""
    fixed = {
        f"ray_kwargs.ray_init.{key}": value
        for key, value in run.get("ray_kwargs.ray_init", {}).items()
        if str(key).endswith("port") and isinstance(value, int) and value > 0
    }
    if run.get(f"{ROLLOUT}.prometheus.enable", False):
        fixed[f"{ROLLOUT}.prometheus.port"] = run.get(f"{ROLLOUT}.prometheus.port")
    # Port 0 lets the system choose: it fails only where loopback cannot be bound at all.
    for key, port in {**fixed, LOOPBACK: 0}.items():
        if not port < 65536:
            return error(f"{key}={port}: must be an integer in [1, 65535]", "another port")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                fix = "another port, or end the program that has it"
                return error(f"{key}={port}: the port is taken", fix)
    chosen = ", ".join(f"{key}={port}" for key, port in fixed.items()) or "none is fixed"
    return ok(f"{chosen}; the others are chosen among free ones at the start")
