"""A run's manifest, its secrets, and whose checkpoints a run may go on from."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from run_files import make_run_files

from data_prep.policies import hub as hub_policy
from hpo_verl.config.recipes import compose_recipe, without_hydra
from hpo_verl.config.redaction import masked
from hpo_verl.errors import DataError
from hpo_verl.launch import manifest
from hpo_verl.runs.checkpoints import TRACKER


@pytest.fixture
def run(tmp_path):
    """A configuration whose files exist, and the run's folder."""
    policy, folder = make_run_files(tmp_path)
    (policy / "model.safetensors").write_bytes(b"weights")
    config = OmegaConf.create(
        {
            "seed": 3,
            "algorithm": {"adv_estimator": "a_hpo"},
            "data": {
                "seed": 5,
                "train_files": [str(tmp_path / "train.parquet")],
                "val_files": str(tmp_path / "val.parquet"),
                "dataloader_num_workers": 8,
            },
            "actor_rollout_ref": {
                "model": {"path": str(policy), "tokenizer_path": None},
                "actor": {"policy_loss": {"loss_mode": "hpo"}, "loss_agg_mode": "token-mean"},
            },
            "trainer": {
                "nnodes": 2,
                "n_gpus_per_node": 8,
                "default_local_dir": str(tmp_path / "checkpoints"),
                "resume_mode": "auto",
            },
            "ray_kwargs": {"env_vars": {"HF_TOKEN": "plainly-secret", "LANG": "C"}},
        }
    )
    return config, folder, tmp_path


COMMAND = ["hpo-verl", "train", "countdown-tiny", "seed=3", "+x.WANDB_API_KEY=abc"]


def record(config, folder):
    checkpoints = Path(config.trainer.default_local_dir)
    manifest.write_manifest(folder, checkpoints, *manifest.checked_manifest(config, COMMAND))
    return json.loads((folder / "manifest.json").read_text())


def test_the_manifest_says_what_the_run_was_made_of(run):
    config, folder, tmp_path = run
    written = record(config, folder)
    text = (folder / "config.yaml").read_bytes()
    assert written["configuration"] == {
        "file": "config.yaml",
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    assert written["data"] == [
        {
            "key": f"data.{name}_files",
            "path": str(tmp_path / f"{name}.parquet"),
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
        }
        for name in ("train", "val")
    ]
    assert written["world_size"] == 16
    assert written["versions"]["verl"] == "0.9.1"
    assert written["versions"]["python"]
    assert written["command"] == [*COMMAND[:-1], "+x.WANDB_API_KEY=***"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(manifest.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if head.returncode == 0:
        assert written["git"]["commit"] == head.stdout.strip()
    assert (tmp_path / "checkpoints" / "manifest.json").read_text() == (
        folder / "manifest.json"
    ).read_text()


def test_the_hash_of_a_policy_is_that_of_its_files(run):
    config, folder, tmp_path = run
    first = record(config, folder)["policy"]["sha256"]
    assert record(config, folder)["policy"]["sha256"] == first
    names = ("model.safetensors", "tokenizer.json")
    lines = [
        f"{name}\0{hashlib.sha256((tmp_path / 'policy' / name).read_bytes()).hexdigest()}\n"
        for name in names
    ]
    assert first == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_commit_of_a_policy_of_the_hub(run):
    config, folder, tmp_path = run
    assert record(config, folder)["policy"]["revision"] is None
    origin = {"repo": "team/model", "revision": "0" * 40, "files": {}}
    (tmp_path / "policy" / hub_policy.MANIFEST).write_text(json.dumps(origin))
    policy = record(config, folder)["policy"]
    assert policy.items() >= {"repo": "team/model", "revision": "0" * 40}.items()
    (tmp_path / "policy" / hub_policy.MANIFEST).write_text("[]")
    with pytest.raises(DataError, match=r"fetched\.json: is not a manifest"):
        record(config, folder)


def test_no_secret_reaches_a_file(run):
    config, folder, _ = run
    record(config, folder)
    for file in folder.iterdir():
        assert "plainly-secret" not in file.read_text()
    assert OmegaConf.load(folder / "config.yaml").ray_kwargs.env_vars == {
        "HF_TOKEN": "***",
        "LANG": "C",
    }


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        ("v", "HF_TOKEN", "***"),
        ("v", "a.api_key", "***"),
        ("v", "AWS_SECRET_ACCESS_KEY", "***"),
        ("v", "db_password", "***"),
        ("v", "tokenizer_path", "v"),
        ("v", "keyboard", "v"),
        (512, "max_token_len", 512),
        ("run with hf_abcdefgh12345678 now", "note", "run with *** now"),
        ("https://me:word@host/x", "url", "https://***@host/x"),  # pragma: allowlist secret
        ("http://127.0.0.1:8265", "url", "http://127.0.0.1:8265"),
        (None, "token", None),
        ("", "token", ""),
    ],
)
def test_what_is_secret(value, key, expected):
    assert masked({key: [value]}) == {key: [expected]}


def test_masking_leaves_the_recipes_as_they_are():
    for recipe in ("countdown-tiny", "countdown4-7b"):
        plain = OmegaConf.to_container(without_hydra(compose_recipe(recipe, [])), resolve=True)
        assert masked(plain) == plain


def trained(tmp_path):
    (tmp_path / "checkpoints" / TRACKER).write_text("2")


def test_the_same_run_goes_on_wherever_its_files_lie(run):
    config, folder, tmp_path = run
    record(config, folder)
    trained(tmp_path)
    kept = (tmp_path / "checkpoints" / "manifest.json").read_bytes()
    (tmp_path / "train.parquet").rename(tmp_path / "moved.parquet")
    config.data.train_files = [str(tmp_path / "moved.parquet")]
    config.seed = 4
    record(config, folder)
    assert "seed: 4" in (folder / "config.yaml").read_text()
    assert (tmp_path / "checkpoints" / "manifest.json").read_bytes() == kept


CHANGES = {
    "algorithm": lambda config, path: config.algorithm.update(adv_estimator="grpo"),
    "model": lambda config, path: (path / "policy" / "model.safetensors").write_bytes(b"other"),
    "adapter": lambda config, path: config.actor_rollout_ref.model.update(lora_rank=8),
    "tokenizer": lambda config, path: config.actor_rollout_ref.model.update(tokenizer_path="a/b"),
    "data.train_files": lambda config, path: (path / "train.parquet").write_bytes(b"other"),
    "data.val_files": lambda config, path: (path / "val.parquet").write_bytes(b"other"),
    "world size": lambda config, path: config.trainer.update(nnodes=1),
    "data.dataloader_num_workers": lambda config, path: config.data.update(
        dataloader_num_workers=0
    ),
}


@pytest.mark.parametrize("mode", ["auto", "disable"])
@pytest.mark.parametrize("name", CHANGES)
def test_another_run_does_not_go_on_from_its_checkpoints(run, name, mode):
    config, folder, tmp_path = run
    record(config, folder)
    trained(tmp_path)
    files = {file: file.read_bytes() for file in folder.iterdir()}
    config.trainer.resume_mode = mode
    CHANGES[name](config, tmp_path)
    with pytest.raises(DataError, match=f"checkpoints of a run with another {name}: ") as refused:
        record(config, folder)
    assert "trainer.default_local_dir=" in str(refused.value)
    assert {file: file.read_bytes() for file in folder.iterdir()} == files


@pytest.mark.parametrize("unknown", ["data.dataloader_num_workers", "adapter"])
def test_checkpoints_of_before_something_was_recorded(run, unknown):
    config, folder, tmp_path = run
    record(config, folder)
    trained(tmp_path)
    path = tmp_path / "checkpoints" / "manifest.json"
    older = json.loads(path.read_text())
    del older[unknown]
    path.write_text(json.dumps(older))
    record(config, folder)


def test_a_named_checkpoint_is_checked_too(run):
    config, folder, tmp_path = run
    record(config, folder)
    trained(tmp_path)
    config.trainer.update(
        {
            "resume_mode": "resume_path",
            "resume_from_path": str(tmp_path / "checkpoints" / "global_step_2"),
            "default_local_dir": str(tmp_path / "elsewhere"),
        }
    )
    record(config, folder)
    config.trainer.nnodes = 1
    with pytest.raises(DataError, match="another world size: 16, now 8"):
        record(config, folder)


@pytest.mark.parametrize("text", [None, "", "[]", '{"policy": {}}'])
def test_checkpoints_without_a_sound_manifest_are_refused(run, text):
    config, folder, tmp_path = run
    (tmp_path / "checkpoints").mkdir()
    trained(tmp_path)
    if text is not None:
        (tmp_path / "checkpoints" / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="no manifest.json" if text is None else "cannot be read"):
        record(config, folder)
    assert list(folder.iterdir()) == []
