"""What a run tells Ray is fit to a cluster that is there; what it cannot have is refused."""

import signal
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from ray._private.runtime_env.packaging import create_package

from hpo_verl.config import cluster
from hpo_verl.config.recipes import compose_recipe, without_hydra


@pytest.fixture
def config(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", raising=False)
    return without_hydra(compose_recipe("countdown-tiny", []))


def test_a_run_of_its_own_keeps_its_settings(config):
    before = config.copy()
    cluster.join(config)
    assert config == before
    assert cluster.joined_address(config) is None


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto"])
@pytest.mark.parametrize("how", ["variable", "setting"])
def test_joining_drops_what_starts_a_cluster(config, monkeypatch, address, how):
    if how == "variable":
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        OmegaConf.update(config, "ray_kwargs.ray_init.address", address, force_add=True)
    OmegaConf.update(config, "ray_kwargs.ray_init._temp_dir", "/x", force_add=True)
    cluster.join(config)
    left = set(config.ray_kwargs.ray_init)
    assert left - {"address"} == {"runtime_env"}


def test_local_is_no_cluster(config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster.joined_address(config) is None


def test_workers_get_what_they_cannot_inherit(config, monkeypatch):
    for name in cluster.FORWARDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TENSORBOARD_DIR", "/run/tensorboard")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql://me:word@db/x")  # pragma: allowlist secret
    before = dict(config.ray_kwargs.ray_init.runtime_env.env_vars)
    assert before["TQ_NUM_THREADS"] == "1"
    cluster.forward_environment(config)
    after = dict(config.ray_kwargs.ray_init.runtime_env.env_vars)
    assert after == {**before, "TENSORBOARD_DIR": "/run/tensorboard"}


def test_the_interfaces_of_nccl_and_gloo_reach_the_workers(config, monkeypatch):
    for name, value in {
        "NCCL_SOCKET_IFNAME": "eth1",
        "NCCL_IB_HCA": "mlx5",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth1",
        "TORCH_NCCL_SECRET": "x",
        "HF_TOKEN": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    key = "ray_kwargs.ray_init.runtime_env.env_vars.NCCL_DEBUG"
    OmegaConf.update(config, key, "WARN", force_add=True)
    cluster.forward_environment(config)
    after = dict(config.ray_kwargs.ray_init.runtime_env.env_vars)
    given = {name: value for name, value in after.items() if "NCCL" in name or "GLOO" in name}
    assert given == {
        "NCCL_SOCKET_IFNAME": "eth1",
        "NCCL_IB_HCA": "mlx5",
        "NCCL_DEBUG": "WARN",
        "GLOO_SOCKET_IFNAME": "eth1",
    }
    assert "HF_TOKEN" not in after


def test_ray_stops_a_job_too_soon_for_a_checkpoint(monkeypatch):
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert cluster.IN_JOB == RAY_JOB_CONFIG_JSON_ENV_VAR
    assert cluster.stop_signals() == (signal.SIGINT, signal.SIGTERM)
    monkeypatch.setenv(cluster.IN_JOB, "{}")
    assert cluster.stop_signals() == (signal.SIGINT,)


def test_environment_of_a_job(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_VERL_CACHE", "cache")
    monkeypatch.delenv("HPO_VERL_CHECKPOINTS", raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    assert cluster.job_runtime_env()["env_vars"] == {
        "NCCL_SOCKET_IFNAME": "eth1",
        "VERL_USE_EXTERNAL_MODULES": "hpo_verl.verl_plugin",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "HPO_VERL_CACHE": str(tmp_path / "cache"),
    }


def uploaded(tmp_path, tree=None):
    """Names of the files that Ray uploads of a folder, or else of this repository."""
    runtime_env = cluster.job_runtime_env()
    create_package(
        str(tree or runtime_env["working_dir"]),
        tmp_path / "package.zip",
        include_gitignore=True,
        excludes=runtime_env["excludes"],
    )
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        return {entry.filename: entry.file_size for entry in package.infolist()}


def test_code_and_recipes_travel_and_nothing_else(tmp_path):
    sizes = uploaded(tmp_path)
    files = [Path(name) for name in sizes if not name.endswith("/")]
    root = Path(cluster.job_runtime_env()["working_dir"])
    folders = {"hpo_verl", "data_prep", "recipes"}
    assert {file.parts[0] for file in files} == folders
    assert {file.suffix for file in files} == {".py", ".yaml"}
    there = {path.relative_to(root) for name in folders for path in (root / name).rglob("*.*")}
    assert set(files) == {path for path in there if path.suffix in (".py", ".yaml")}
    # Code alone, which Ray packs without compression: a job's start does not wait for it.
    assert sum(sizes.values()) < 2 << 20


def test_data_and_secrets_stay(tmp_path):
    travels = ("hpo_verl/cli.py", "data_prep/__init__.py", "recipes/algo/a_hpo.yaml")
    stays = (
        *(".git/config", ".venv/bin/python.py", ".env", ".netrc", ".aws/a.yaml", "hf_token.txt"),
        *("runs/a/metrics.jsonl", "data/train.parquet", "policy/model.safetensors", "setup.py"),
        *("checkpoints/model_world_size_1_rank_0.pt", "id.pem", "prod.env", "config.yaml"),
        *("hpo_verl/__pycache__/cli.pyc", "build/lib/a.py", "my_secret.py", "tests/a.py"),
        *("hpo_verl/.env", "hpo_verl/hf.key", "hpo_verl/rows.parquet", "hpo_verl/.hidden/a.py"),
        *("recipes/secrets.yaml", "recipes/hf_token", "recipes/a.credentials.yaml", "a.b/c.py"),
    )
    for name in (*travels, *stays):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text("x")
    assert set(uploaded(tmp_path, tmp_path / "tree")) == set(travels)
