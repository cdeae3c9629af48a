"""What a run tells Ray is fit to a cluster that is there; what it cannot have is refused."""

import signal

import pytest
from omegaconf import OmegaConf

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
    assert not cluster.joins_cluster(config)


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
    assert not cluster.joins_cluster(config)


def test_workers_get_what_they_cannot_inherit(config, monkeypatch):
    for name in cluster.FORWARDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TENSORBOARD_DIR", "/run/tensorboard")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
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
