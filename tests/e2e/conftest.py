"""Data, tiny policy and one finished run beside another, which all modules here share."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from real_runs import BIN, SMALL, listening_addresses, memory_bytes, run_processes, start

from hpo_verl.launch.process import SHARED_MEMORY


class Trained(NamedTuple):
    """A finished run of the command, and what was seen of it meanwhile."""

    folder: Path
    output: str
    addresses: set[str]
    peak_memory: int
    beside: Path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where data and tiny policy lie, made once."""
    folder = tmp_path_factory.mktemp("cache")
    assert start([BIN / "hpo-verl", "prepare", "countdown-tiny"], folder).wait() == 0
    return folder


@pytest.fixture(scope="session")
def trained(cache, tmp_path_factory):
    """A run of the command while stock verl runs the same recipe beside it."""
    folder = tmp_path_factory.mktemp("run") / "a_hpo"
    beside = tmp_path_factory.mktemp("stock")
    shared_memory = set(os.listdir(SHARED_MEMORY))
    before = run_processes()
    process = start(
        [BIN / "hpo-verl", "train", "countdown-tiny", *SMALL, f"hydra.run.dir={folder}"],
        cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    stock = start(
        [
            *(sys.executable, "-m", "verl.trainer.main_ppo"),
            *("--config-dir", Path(__file__).parents[2] / "recipes"),
            *("--config-name", "countdown-tiny", *SMALL, f"hydra.run.dir={beside}/run"),
        ],
        cache,
        cwd=beside,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    addresses, peak_memory = set(), 0
    while process.poll() is None:
        ours = {pid: found for pid, found in run_processes().items() if pid not in before}
        addresses |= listening_addresses(ours)
        peak_memory = max(peak_memory, memory_bytes(ours))
        time.sleep(1)
    output = process.stdout.read()
    assert process.returncode == 0, output
    assert set(run_processes()) - set(before) == set()
    assert stock.wait() == 0
    assert set(os.listdir(SHARED_MEMORY)) - shared_memory == set()
    return Trained(folder, output, addresses, peak_memory, beside / "run")
