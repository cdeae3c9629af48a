"""A checkpoint is found, checked before anything is loaded from it, and never half exported."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from lab_policies import random_model
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.cli import app
from hpo_verl.config.recipes import compose_recipe, without_hydra
from hpo_verl.errors import DataError, EnvironmentCheckError
from hpo_verl.launch.manifest import CONFIG_NAME
from hpo_verl.launch.outputs import _shard_files, checkpoint_folder, export, make_policy
from hpo_verl.runs.checkpoints import SEAL, TRACKER
from hpo_verl.verl_plugin import merge


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
    assert [file.name for file in _shard_files(actor)[:2]] == [
        "model_world_size_2_rank_0.pt",
        "model_world_size_2_rank_1.pt",
    ]


def test_no_checkpoint(run, tmp_path):
    with pytest.raises(DataError, match="none is not a folder"):
        checkpoint_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"no checkpoint \(global_step_N\) in"):
        checkpoint_folder(tmp_path)
    (run / "checkpoints" / TRACKER).write_text("9")
    with pytest.raises(DataError, match="holds no whole checkpoint; there are: global_step_7"):
        checkpoint_folder(run)
    (run / "checkpoints" / TRACKER).write_text("7")
    (run / "checkpoints" / "global_step_7" / "actor" / "fsdp_config.json").unlink()
    with pytest.raises(DataError, match="global_step_7 is no FSDP checkpoint"):
        checkpoint_folder(run)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A run of a GPU recipe, whose configuration puts checkpoints into a folder of its own."""
    monkeypatch.setenv("HPO_VERL_CHECKPOINTS", str(tmp_path / "kept"))
    config = without_hydra(compose_recipe("countdown3-1.5b", ["hardware=1gpu"]))
    OmegaConf.resolve(config)
    folder, kept = tmp_path / "run", Path(config.trainer.default_local_dir)
    folder.mkdir()
    assert kept.parent == tmp_path / "kept"
    (folder / CONFIG_NAME).write_text(OmegaConf.to_yaml(config))
    return folder, kept


def save(kept, step, model=None, sealed=True):
    """A checkpoint of one rank as verl's FSDP engine and the seal leave it."""
    model = model or random_model(len(build_tokenizer()), seed=step)
    actor = kept / f"global_step_{step}" / "actor"
    model.config.architectures = ["Qwen2ForCausalLM"]
    model.config.save_pretrained(actor / "huggingface")
    build_tokenizer().save_pretrained(actor / "huggingface")
    torch.save(dict(model.state_dict()), actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    if sealed:
        (actor.parent / SEAL).write_text("{}")
    return model


def reached(folder, *steps):
    rows = [json.dumps({"step": step, "data": {}}) + "\n" for step in steps]
    (folder / "metrics.jsonl").write_text("".join(rows))


def test_a_run_whose_checkpoints_lie_elsewhere(elsewhere, tmp_path):
    folder, kept = elsewhere
    with pytest.raises(DataError, match=f"no checkpoint .* in .* or {kept}"):
        checkpoint_folder(folder)
    model = save(kept, 50)
    result = CliRunner().invoke(app, ["export", str(folder), "--out", str(tmp_path / "out")])
    assert result.exception is None, result.exception
    assert result.stdout == f"{kept / 'global_step_50' / 'actor'} -> {tmp_path / 'out'}\n"
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(exported[name], tensor.bfloat16()), name


def test_the_newest_checkpoint_that_is_whole_and_that_the_run_had_reached(elsewhere):
    folder, kept = elsewhere
    save(kept, 50)
    save(kept, 100)
    save(kept, 150, sealed=False)
    assert checkpoint_folder(folder).parent.name == "global_step_100"
    reached(folder, 0, 99)
    assert checkpoint_folder(folder).parent.name == "global_step_50"
    reached(folder, 0, 49)
    with pytest.raises(
        DataError, match=r"no whole checkpoint up to step 49, the run's last; there"
    ):
        checkpoint_folder(folder)
    for torn in ("{}\n", "[" * 100_000 + "\n"):
        (folder / "metrics.jsonl").write_text(torn)
        with pytest.raises(DataError, match=r"metrics\.jsonl cannot be read"):
            checkpoint_folder(folder)
    (folder / CONFIG_NAME).write_text("a: [\n")
    with pytest.raises(DataError, match=r"config\.yaml cannot be read \(.*line 2.*\)$") as error:
        checkpoint_folder(folder)
    assert "\n" not in str(error.value)


def test_the_policy_of_a_finished_run(elsewhere):
    folder, kept = elsewhere
    told = []
    assert make_policy(folder, told.append) is None
    model = save(kept, 50)
    (folder / "policy").mkdir()
    (folder / "policy" / "stale").write_text("")
    assert make_policy(folder, told.append) == folder / "policy"
    assert told == []
    loaded = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder / "policy")) == model.config.vocab_size
    names = {path.name for path in folder.iterdir()}
    assert names == {CONFIG_NAME, "policy"}
    assert not (folder / "policy" / "stale").exists()


@pytest.mark.parametrize("lack", ["memory", "disk", "shard"])
def test_a_policy_that_cannot_be_made_here_fails_no_run(elsewhere, monkeypatch, lack):
    folder, kept = elsewhere
    save(kept, 50)
    if lack == "memory":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    if lack == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    if lack == "shard":
        (kept / "global_step_50" / "actor" / "model_world_size_1_rank_0.pt").write_bytes(b"cut")
    told = []
    assert make_policy(folder, told.append) is None
    (line,) = told
    assert line.startswith("no policy/: ")
    assert line.endswith(f"; later: hpo-verl export {folder} --out policy")
    assert {"shard": "is damaged"}.get(lack, f"{lack}: 0 MiB free; need") in line
    assert [path.name for path in folder.iterdir()] == [CONFIG_NAME]


def test_what_merging_takes(elsewhere):
    """Two tensors in float32 on two ranks: 24 numbers of 2 bytes; the shards and one of them."""
    shards = [elsewhere[1].parent / f"{rank}.pt" for rank in range(2)]
    shards[0].parent.mkdir(parents=True)
    for shard in shards:
        torch.save({"a": torch.ones(2, 4), "b": torch.ones(4)}, shard)
    size = shards[0].stat().st_size
    assert merge.needed_bytes(shards) == (48, 3 * size)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("fsdp_config.json", "{}", "does not say how many ranks"),
        ("fsdp_config.json", "[", "does not say how many ranks"),
        ("fsdp_config.json", '{"world_size": 0}', "does not say how many ranks"),
        ("fsdp_config.json", '{"world_size": 1e400}', "does not say how many ranks"),
        ("fsdp_config.json", "[" * 100_000, "does not say how many ranks"),
        # As many names would not fit into memory.
        ("fsdp_config.json", '{"world_size": 1e15}', "_rank_0.pt is missing; fsdp_config.json"),
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


def test_a_torn_note_of_the_last_checkpoint_is_no_checkpoint(run, tmp_path):
    folder = run / "checkpoints"
    (folder / TRACKER).write_bytes(b"\xff\xfe")
    for seal in folder.glob(f"*/{SEAL}"):
        seal.unlink()
    with pytest.raises(DataError, match="holds no whole checkpoint"):
        export(run, tmp_path / "out")


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
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_kept(run, tmp_path):
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, EnvironmentCheckError)
    assert "exists already" in str(result.exception)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="file is a file; a folder is needed"):
        export(run, blocked / "policy")
