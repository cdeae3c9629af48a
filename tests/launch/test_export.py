"""A checkpoint is found, checked before anything is loaded from it, and never half exported."""

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from hpo_verl.cli import app
from hpo_verl.errors import DataError, EnvironmentCheckError
from hpo_verl.launch.checkpoints import TRACKER
from hpo_verl.launch.export import checkpoint_folder, export, shard_files


@pytest.fixture
def run(tmp_path):
    """A run of two ranks whose last checkpoint is that of step 7."""
    checkpoints = tmp_path / "run" / "checkpoints"
    actor = checkpoints / "global_step_7" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface" / "config.json").write_text("{}")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
    for rank in range(2):
        torch.save({"w": torch.ones(2)}, actor / f"model_world_size_2_rank_{rank}.pt")
    (checkpoints / TRACKER).write_text("7")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "given",
    [
        "",
        "checkpoints",
        "checkpoints/global_step_7",
        "checkpoints/global_step_7/actor",
    ],
)
def test_every_folder_that_means_a_checkpoint(run, given):
    actor = run / "checkpoints" / "global_step_7" / "actor"
    assert checkpoint_folder(run / given) == actor
    assert [file.name for file in shard_files(actor)[:2]] == [
        "model_world_size_2_rank_0.pt",
        "model_world_size_2_rank_1.pt",
    ]


def test_no_checkpoint(run, tmp_path):
    with pytest.raises(DataError, match="none is not a folder"):
        checkpoint_folder(tmp_path / "none")
    with pytest.raises(DataError, match="is neither a run with checkpoints"):
        checkpoint_folder(tmp_path)
    (run / "checkpoints" / TRACKER).write_text("9")
    with pytest.raises(DataError, match="names global_step_9, which is no FSDP checkpoint"):
        checkpoint_folder(run)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("fsdp_config.json", "{}", "does not say how many ranks"),
        ("fsdp_config.json", "[", "does not say how many ranks"),
        ("model_world_size_2_rank_1.pt", None, "rank_1.pt is missing; fsdp_config.json says 2"),
        ("huggingface/config.json", None, "config.json is missing"),
        ("model_world_size_2_rank_1.pt", "cut", "rank_1.pt is damaged"),
    ],
)
def test_incomplete_checkpoints(run, tmp_path, file, content, message):
    path = run / "checkpoints" / "global_step_7" / "actor" / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        export(run, tmp_path / "out" / "policy")
    assert not (tmp_path / "out").exists()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_shard_that_would_run_something_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard = run / "checkpoints" / "global_step_7" / "actor" / "model_world_size_2_rank_0.pt"
    torch.save({"w": Hostile()}, shard)
    with pytest.raises(DataError, match=f"{shard} is damaged, or holds more than tensors"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


def test_a_failed_merge_leaves_nothing(run, tmp_path):
    # The model's configuration is empty, so that verl cannot know its class.
    with pytest.raises(DataError, match="verl's model merger failed"):
        export(run, tmp_path / "out" / "policy")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_target_is_kept(run, tmp_path):
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, EnvironmentCheckError)
    assert "exists already" in str(result.exception)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(EnvironmentCheckError, match="no permission to write"):
        export(run, blocked / "policy")
