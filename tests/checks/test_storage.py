"""Disks, folders, shared memory and ports that a run cannot use."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_sizes import MODEL_SIZES

from hpo_verl.checks import storage
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.storage import (
    check_disk,
    check_folders,
    check_paths,
    check_ports,
    check_shared_memory,
)
from hpo_verl.config.recipes import recipe_names

SIZE = MODEL_SIZES["Qwen/Qwen2.5-7B-Instruct"]
GIB = 1 << 30


@pytest.fixture
def free(monkeypatch):
    """Pretend that every disk has so many GiB free."""

    def fake(gib):
        usage = SimpleNamespace(free=int(gib * GIB))
        monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)

    return fake


def test_the_small_run_can_write_and_writes_nothing(planned, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(PlannedRun, "size", None)
    run = planned()
    looks = (check_folders, check_disk, check_shared_memory, check_ports)
    findings = [look(run) for look in looks]
    assert [f.status for f in findings] == ["ok", "skipped", "ok", "ok"]
    assert str(tmp_path / "run") in findings[0].detail
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_a_file(planned, tmp_path):
    (tmp_path / "run").write_text("")
    finding = check_folders(planned())
    assert finding.status == "error"
    assert f"{tmp_path / 'run'} is not a folder" in finding.detail


@pytest.fixture
def nobody():
    """Root may write anywhere, so ask as somebody else would."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


def test_a_folder_without_permission(planned, request, tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    run = planned({"trainer.default_local_dir": str(tmp_path / "closed" / "c" / "d")})
    request.getfixturevalue("nobody")
    finding = check_folders(run)
    assert (finding.status, "cannot be written to (Permission" in finding.detail) == ("error", True)


@pytest.mark.parametrize("folder", ["/proc/x", "/sys/x"])
@pytest.mark.parametrize("key", ["default_local_dir", "rollout_data_dir", "validation_data_dir"])
def test_a_folder_where_no_file_can_be_made(planned, key, folder):
    finding = check_folders(planned({f"trainer.{key}": folder}))
    assert finding.status == "error"
    place = folder.rsplit("/", 1)[0]
    assert f"{key} {folder}: {place} cannot be written to (" in finding.detail


PATHS = {
    "data.train_files": "data.train_files",
    "prepare.data.output": "data.train_files",
    "trainer.default_local_dir": "trainer.default_local_dir",
    "actor_rollout_ref.model.path": "actor_rollout_ref.model.path",
    "reward.custom_reward_function.path": "reward.custom_reward_function.path",
}


@pytest.mark.parametrize("key", PATHS)
def test_a_path_that_another_machine_would_look_for_elsewhere(planned, key):
    (finding,) = check_paths(planned({key: "some/where"}, address="auto"))
    assert finding.status == "error"
    assert finding.detail.startswith(f"{PATHS[key]}=some/where")
    assert "must be absolute" in finding.detail
    assert check_paths(planned({key: "some/where"})) == []


def test_a_relative_run_folder(planned):
    run = replace(planned(address="auto"), given_folder=Path("runs/a"))
    assert "hydra.run.dir=runs/a: must be absolute" in check_paths(run)[0].detail
    assert check_paths(replace(run, given_folder=Path("~/a")))[0].status == "warning"


def test_recipes_name_absolute_paths_only(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for recipe in recipe_names():
        run = PlannedRun(recipe, (), tmp_path, "auto")
        assert check_paths(run)[0].status == "warning"


def test_whether_a_disk_is_shared_is_not_claimed(planned):
    (finding,) = check_paths(planned({"trainer.nnodes": 2}))
    assert (finding.status, "was not checked" in finding.detail) == ("warning", True)


@pytest.mark.parametrize(
    ("changes", "gib", "checkpoints"),
    [
        # Two are kept and a third is written: 12 bytes a parameter, and 1 GiB for logs.
        ({}, 3 * 12 * 7_615_616_512 / GIB + 1, 3),
        ({"trainer.total_training_steps": 50}, 12 * 7_615_616_512 / GIB + 1, 1),
        ({"trainer.max_actor_ckpt_to_keep": None}, 4 * 12 * 7_615_616_512 / GIB + 1, 4),
        (
            {"actor_rollout_ref.actor.checkpoint.save_contents": ["model", "hf_model"]},
            3 * 8 * 7_615_616_512 / GIB + 1,
            3,
        ),
        # Two copies, of which verl saves both.
        ({"actor_rollout_ref.actor.fsdp_config.fsdp_size": 4}, 3 * 24 * 7_615_616_512 / GIB + 1, 3),
    ],
)
def test_disk_for_checkpoints(planned, free, monkeypatch, changes, gib, checkpoints):
    run = planned(changes, recipe="countdown4-7b", hardware="8gpu")
    monkeypatch.setattr(PlannedRun, "size", SIZE)
    free(gib + 0.01)
    finding = check_disk(run)
    assert (finding.status, f"and checkpoints ({checkpoints} x " in finding.detail) == ("ok", True)
    free(gib - 0.01)
    finding = check_disk(run)
    assert (finding.status, "HPO_VERL_CHECKPOINTS" in finding.fix) == ("error", True)
    assert f"{gib:.2f} GiB for" in finding.detail


def test_without_checkpoints_the_size_does_not_matter(planned, free, monkeypatch):
    monkeypatch.setattr(PlannedRun, "size", None)
    assert check_disk(planned({"trainer.save_freq": -1})).status == "ok"
    free(0.99)
    assert "1.00 GiB for logs; 0.99 GiB free" in check_disk(planned()).detail


def test_shared_memory_for_the_weights_and_for_ray(planned, free):
    key = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    run = planned({"trainer.n_gpus_per_node": 2, key: 1024})
    free(2.1)
    assert check_shared_memory(run).status == "ok"
    free(1.9)
    finding = check_shared_memory(run)
    assert finding.status == "error"
    assert finding.detail.startswith("2.00 GiB for the weights (2 x 1024 MiB)")
    # Docker's 64 MB: cards need none of it for the weights.
    free(0.0625)
    assert check_shared_memory(planned(recipe="countdown4-7b", hardware="8gpu")).status == "ok"
    free(0.01)
    assert "object_store_memory" in check_shared_memory(planned()).detail


def test_a_machine_without_shared_memory(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "SHARED_MEMORY", tmp_path / "none")
    assert check_shared_memory(planned()).status == "skipped"


@pytest.mark.parametrize(
    ("key", "others"),
    [
        ("ray_kwargs.ray_init.dashboard_port", {}),
        (
            "actor_rollout_ref.rollout.prometheus.port",
            {"actor_rollout_ref.rollout.prometheus.enable": True},
        ),
    ],
)
def test_a_taken_port(planned, key, others):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = check_ports(planned({key: port, **others}))
        assert (finding.status, finding.detail) == ("error", f"{key}={port}: the port is taken")
    assert check_ports(planned({key: port, **others})).status == "ok"
