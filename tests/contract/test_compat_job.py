"""`make compat` takes the versions that it lists, and no other; nothing is installed here."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def dry_run(*words):
    # make, under which this runs, hands its own words to its children.
    inherited = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VERL", "COMPAT_VENV")
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    return subprocess.run(
        ["make", "-n", "compat", "PYTHON=python3", *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1"])
def test_a_listed_version_gets_an_environment_of_its_own(version):
    done = dry_run(f"VERL={version}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"python3 -m venv .venv-verl-{version}"
    assert all(line.startswith(f".venv-verl-{version}/bin/") for line in lines[1:])
    assert lines[1].endswith("torch==2.13.0")
    assert lines[-2].endswith(f"--no-deps verl=={version}")
    assert lines[-1].endswith("tests/contract")


@pytest.mark.parametrize("words", [[], ["VERL=0.8.0"], ["VERL=0.9.0 0.8.0"], ["VERL=;ls"]])
def test_another_version_is_refused_with_those_permitted(words):
    done = dry_run(*words)
    assert done.returncode == 2
    assert "must be one of 0.9.0 0.9.1" in done.stderr
    assert done.stdout == ""
