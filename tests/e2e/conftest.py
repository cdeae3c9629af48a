"""Data, tiny policy and one finished run beside another, which all modules here share."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from real_runs import BIN, SMALL, Watched, rollouts, run_and_watch, start


class Trained(NamedTuple):
    """A finished run of the command, what was seen of it, and the run beside it."""

    folder: Path
    watched: Watched
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
    command = [BIN / "hpo-verl", "train", "countdown-tiny", *SMALL, f"hydra.run.dir={folder}"]
    command.append(f"trainer.rollout_data_dir={rollouts(folder)}")
    stock = [
        *(sys.executable, "-m", "verl.trainer.main_ppo"),
        *("--config-dir", Path(__file__).parents[2] / "recipes"),
        *("--config-name", "countdown-tiny", *SMALL, f"hydra.run.dir={beside}/run"),
    ]
    quiet = {"cwd": beside, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    watched = run_and_watch(command, cache, beside=[(stock, quiet)])
    return Trained(folder, watched, beside / "run")
