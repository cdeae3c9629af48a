"""Data, tiny policy and one finished run, which all modules here share."""

import os
import subprocess
import time

import pytest
from real_runs import BIN, SMALL, listening_addresses, run_processes, start

from hpo_verl.launch.process import SHARED_MEMORY


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def trained(cache, tmp_path_factory):
    """One finished run of the command, and the addresses that its processes listened on."""
    folder = tmp_path_factory.mktemp("run") / "a_hpo"
    shared_memory = set(os.listdir(SHARED_MEMORY))
    before = run_processes()
    process = start(
        [BIN / "hpo-verl", "train", "countdown-tiny", *SMALL, f"hydra.run.dir={folder}"],
        cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    addresses = set()
    while process.poll() is None:
        addresses |= listening_addresses(run_processes())
        time.sleep(1)
    output = process.stdout.read()
    assert process.returncode == 0, output
    assert set(run_processes()) - set(before) == set()
    assert set(os.listdir(SHARED_MEMORY)) - shared_memory == set()
    return folder, output, addresses
