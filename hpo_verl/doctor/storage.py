"""Whether disks, folders, shared memory and ports are as a run needs them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hpo_verl.doctor.finding import Finding, attempt, error, ok, skipped, warning
from hpo_verl.doctor.memory import ACTOR, GIB, ROLLOUT
from hpo_verl.doctor.model_size import ModelSize
from hpo_verl.doctor.subject import Subject
from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.launch import checks
from hpo_verl.launch.cluster import cards_a_copy
from hpo_verl.launch.process import SHARED_MEMORY

# Bytes a parameter of what verl saves, all in float32 at most: of each copy that cards share,
# and once.
SAVED_BYTES = {"model": 4, "optimizer": 8}
SAVED_ONCE_BYTES = {"hf_model": 4}
LOOPBACK = "127.0.0.1"


def check_storage(subject: Subject, size: ModelSize | None) -> list[Finding]:
    """All checks of places where a run writes."""
    return [
        check_folders(subject),
        check_disk(subject, size),
        check_shared_memory(subject),
        check_ports(subject),
    ]


def written_folders(subject: Subject) -> Iterator[tuple[str, Path]]:
    """What a run writes, and where."""
    yield "run folder", subject.run_folder
    yield "trainer.default_local_dir", subject.checkpoint_folder


def check_folders(subject: Subject) -> Finding:
    """Whether the folders can be made and written, and mean the same on every machine."""
    several = subject.address is not None or subject.get("trainer.nnodes", 1) > 1
    for what, folder in written_folders(subject):
        existing = checks.nearest_existing(folder)
        if not existing.is_dir():
            return error("folders", f"{what} {folder}: {existing} is not a folder", "another path")
        if not os.access(existing, os.W_OK | os.X_OK):
            return error(
                "folders",
                f"{what} {folder}: no permission to write to {existing}",
                "another path, or the permission of its owner",
            )
    given = subject.get("trainer.default_local_dir")
    if several and not (given and Path(given).expanduser().is_absolute()):
        return error(
            "folders",
            f"trainer.default_local_dir={given}: the processes of a cluster have other working "
            "folders",
            "trainer.default_local_dir=/an/absolute/path on a disk that all machines share",
        )
    shown = ", ".join(f"{what} {folder}" for what, folder in written_folders(subject))
    if several:
        return warning(
            "folders",
            f"{shown}: writable here; whether all machines share that disk was not checked",
            "put it on a disk that all machines see",
        )
    return ok("folders", f"{shown}: writable")


def check_disk(subject: Subject, size: ModelSize | None) -> Finding:
    """Compare the checkpoints of a run with the free disk."""
    folder = subject.checkpoint_folder
    free = shutil.disk_usage(checks.nearest_existing(folder)).free
    base = checks.FREE_DISK_BYTES
    every = subject.get("trainer.save_freq", -1)
    if size is None and every > 0:
        return skipped("disk", "the dimensions of the policy are unknown")
    contents = subject.get(f"{ACTOR}.checkpoint.save_contents", ["model", "optimizer", "extra"])
    copies = subject.get("trainer.nnodes") * subject.get("trainer.n_gpus_per_node")
    copies //= cards_a_copy(subject.config)
    each = sum(
        copies * SAVED_BYTES.get(str(name), 0) + SAVED_ONCE_BYTES.get(str(name), 0)
        for name in contents
    )
    parameters = size.parameters if size else 0
    count = _checkpoints_at_once(subject) if every > 0 else 0
    needed = count * each * parameters + base
    text = (
        f"{needed / GIB:.1f} GiB for checkpoints ({count} x {each} bytes x {parameters:,} "
        f"parameters) and logs; {free / GIB:.1f} GiB free at {folder}"
    )
    if needed > free:
        return error(
            "disk",
            text,
            "free some, another trainer.default_local_dir (HPO_VERL_CHECKPOINTS), or a smaller "
            "trainer.max_actor_ckpt_to_keep",
        )
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
    if subject.address:
        return skipped(name, "only the cluster's own machines know theirs")
    if not SHARED_MEMORY.is_dir():
        return skipped(name, f"there is no {SHARED_MEMORY}")

    def look() -> str:
        checks.check_shared_memory(subject.config)
        free = shutil.disk_usage(SHARED_MEMORY).free
        bucket = subject.get(f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes", 0)
        ranks = subject.get("trainer.n_gpus_per_node", 1)
        needed = ranks * bucket << 20
        text = (
            f"{needed / GIB:.2f} GiB for the weights ({ranks} x {bucket} MiB); "
            f"{free / GIB:.1f} GiB of {SHARED_MEMORY} free"
        )
        if needed > free:
            raise EnvironmentCheckError(text)
        return text

    return attempt(name, look, f"enlarge {SHARED_MEMORY}; in Docker --shm-size=64g")


def check_ports(subject: Subject) -> Finding:
    """Whether the ports that the configuration fixes are free, and what RAY_ADDRESS would do."""
    if subject.address:
        return skipped("ports", "the cluster has its own")
    elsewhere = os.environ.get("RAY_ADDRESS")
    if elsewhere:
        return warning(
            "ports",
            f"RAY_ADDRESS={elsewhere}: Ray would join that cluster instead of starting here",
            "unset RAY_ADDRESS, or give --address",
        )
    fixed = checks.fixed_ports(subject.config)
    if subject.get(f"{ROLLOUT}.prometheus.enable", False):
        fixed[f"{ROLLOUT}.prometheus.port"] = subject.get(f"{ROLLOUT}.prometheus.port")

    def look() -> str:
        for key, port in fixed.items():
            checks.check_port(key, port)
        # Port 0 lets the system choose: it fails only where loopback cannot be bound at all.
        checks.check_port(LOOPBACK, 0)
        chosen = ", ".join(f"{key}={port}" for key, port in fixed.items()) or "none is fixed"
        return f"{chosen}; the others are chosen among free ones at the start"

    return attempt("ports", look, "another port, or end the program that has it")
