"""Starts real runs of the trainer, and finds what they leave."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from waiting import wait_until

from hpo_verl.runs.process import MARKER, SHARED_MEMORY

BIN = Path(sys.executable).parent
STEPS = 3
SMALL = [
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    f"trainer.total_training_steps={STEPS}",
    f"trainer.save_freq={STEPS}",
    f"trainer.test_freq={STEPS}",
]
# Wall-clock time and memory differ between any two runs.
NOT_REPEATABLE = ("timing", "perf/", "actor/perf/", "mfu")


def start(command, cache, variables=None, **options):
    environment = {**os.environ, "HPO_VERL_CACHE": str(cache), "RAY_worker_niceness": "0"}
    environment |= variables or {}
    # Tests that were started in the background ignore Ctrl-C; a run that they start must not.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment, text=True, preexec_fn=heed, **options)


def read_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["data"] for row in map(json.loads, lines)}


def run_to_end(cache, folder, *overrides):
    """Output of a short run, which must succeed."""
    command = [BIN / "hpo-verl", "train", "countdown-tiny", *SMALL, *overrides]
    process = start(
        [*command, f"hydra.run.dir={folder}"],
        cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def train(cache, folder, *overrides):
    """Metrics of every step of a short run without validations, which must succeed."""
    quiet = ("trainer.val_before_train=false", "trainer.test_freq=-1")
    run_to_end(cache, folder, *quiet, *overrides)
    return read_metrics(folder)


def rollouts(folder):
    """Where the run of a folder is told to write its responses: beside it."""
    return folder.parent / "rollouts"


def repeatable(metrics):
    return {
        step: {key: value for key, value in data.items() if not key.startswith(NOT_REPEATABLE)}
        for step, data in metrics.items()
    }


def run_processes(cache):
    """Processes of our runs with this cache, whoever else runs here: they inherit both marks."""
    found = {}
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        ours = MARKER in environment and environment.get("HPO_VERL_CACHE") == str(cache)
        if ours and process.status() != psutil.STATUS_ZOMBIE:
            found[process.pid] = process
    return found


def shared_memory(process):
    """Files in shared memory that a process has mapped."""
    return [m.path for m in process.memory_maps() if m.path.startswith(f"{SHARED_MEMORY}/")]


def abandoned_memory(before):
    """Files in shared memory that are new, and that no living process has mapped."""
    new = {f"{SHARED_MEMORY}/{name}" for name in set(os.listdir(SHARED_MEMORY)) - before}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            new -= set(shared_memory(process))
    return {file for file in new if Path(file).exists()}


def listening_addresses(processes):
    addresses = set()
    for process in processes.values():
        try:
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return addresses


def memory_bytes(processes):
    """Memory of all of them; what they share is counted once."""
    total = 0
    for process in processes.values():
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


class Watched(NamedTuple):
    """What was seen of a finished run."""

    output: str
    addresses: set[str]
    peak_memory: int


def run_and_watch(command, cache, beside=()):
    """Run to the end, and see where its processes listen and how much they take.

    Nothing of the run may remain, neither a process nor shared memory.

    Args:
        command: of the run.
        cache: where its data are.
        beside: commands and options of `start` of other runs, to be started with it.
    """
    shared_memory = set(os.listdir(SHARED_MEMORY))
    process = start(command, cache, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    others = [start(other, cache, **options) for other, options in beside]
    addresses, peak_memory = set(), 0
    while process.poll() is None:
        ours = run_processes(cache)
        addresses |= listening_addresses(ours)
        peak_memory = max(peak_memory, memory_bytes(ours))
        time.sleep(1)
    output = process.stdout.read()
    assert process.returncode == 0, output
    assert run_processes(cache) == {}
    assert all(other.wait() == 0 for other in others)
    assert abandoned_memory(shared_memory) == set()
    return Watched(output, addresses, peak_memory)


def wait_for_step(folder, step, process, seconds=240):
    file = folder / "metrics.jsonl"

    def reached():
        assert process.poll() is None, "the run ended early"
        return file.exists() and f'"step":{step},' in file.read_text()

    wait_until(reached, seconds)
