"""Data, tiny policy and one finished run, which all modules here share."""

import pytest
from real_runs import BIN, SMALL, run_and_watch


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def trained(cache, tmp_path_factory):
    """One finished run of the command, and the addresses that its processes listened on."""
    folder = tmp_path_factory.mktemp("run") / "a_hpo"
    command = [BIN / "hpo-verl", "train", "countdown-tiny", *SMALL, f"hydra.run.dir={folder}"]
    output, addresses = run_and_watch(command, cache)
    return folder, output, addresses
