"""A model of the hub comes at a commit, whole, without code, or not at all."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from loopback_hub import LoopbackHub
from omegaconf import OmegaConf
from safetensors.torch import save
from torch import ones

from data_prep.policies import hub as hub_policy
from hpo_verl.checks.prepare import make_missing, preparations
from hpo_verl.errors import DataError
from hpo_verl.launch.manifest import checked_manifest
from hpo_verl.runs import files

REPO, COMMIT = "some-team/Some-Model-1.5B", "0123456789abcdef" * 2 + "01234567"
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"terms",
    "model-00001-of-00002.safetensors": save({"a": ones(64)}),
    "model-00002-of-00002.safetensors": save({"b": ones(32)}),
    "model.safetensors.index.json": b'{"weight_map": {}}',
}
UNWANTED = {
    "README.md": b"x",
    "modeling_own.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": save({"a": ones(64)}),
    "original/params.json": b"{}",
    ".gitattributes": b"x",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a model, and a cache of its own."""
    hub = LoopbackHub(REPO, COMMIT, FILES | UNWANTED)
    with hub.running() as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        hub.url = url
        yield hub


@pytest.fixture
def out(tmp_path):
    return tmp_path / "models" / "policy"


def refused(out, message):
    with pytest.raises(DataError, match=message):
        hub_policy.fetch(out, REPO, COMMIT)
    assert not out.parent.exists()


def test_the_command_fetches_what_a_policy_needs_and_nothing_that_runs(hub, out, tmp_path):
    command = [sys.executable, "-m", "data_prep.policies.hub", "--out", str(out)]
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [*command, "--repo", REPO, "--revision", COMMIT],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{REPO} at {COMMIT}, 9 files" in done.stdout
    assert {file.name for file in out.iterdir()} == {*FILES, hub_policy.MANIFEST}
    assert all((out / name).read_bytes() == content for name, content in FILES.items())
    assert not UNWANTED.keys() & set(hub.fetched)
    assert [path.name for path in out.parent.iterdir()] == ["policy"]
    manifest = hub_policy.read_manifest(out)
    assert (manifest["repo"], manifest["revision"]) == (REPO, COMMIT)


def test_the_files_take_no_room_twice(hub, out, tmp_path):
    hub_policy.fetch(out, REPO, COMMIT)
    cached = {os.stat(path).st_ino for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert all((out / name).stat().st_ino in cached for name in FILES)
    assert not any(file.is_symlink() for file in out.iterdir())


def test_where_links_cannot_be_made_files_are_copied(hub, out, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    hub_policy.fetch(out, REPO, COMMIT)
    assert hub_policy.read_manifest(out)["repo"] == REPO


@pytest.mark.parametrize("name", ["merges.txt", "model-00002-of-00002.safetensors"])
def test_other_bytes_than_the_commits(hub, out, name):
    # Of the same length: the client itself compares only that.
    hub.served[name] = FILES[name][:-1] + b"!"
    refused(out, rf"its content is not that of {name} in {REPO} at commit {COMMIT}")


def test_code_is_refused_before_the_weights_are_fetched(hub, out):
    hub.files["config.json"] = b'{"auto_map": {"AutoConfig": "modeling_own.Config"}}'
    refused(out, r"config\.json names code to execute \(auto_map\)")
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_weights_that_are_pickles(hub, out):
    hub.files = dict.fromkeys(("config.json", "pytorch_model.bin", "consolidated.pth"), b"x")
    refused(out, "has no weights in safetensors")
    assert not hub.fetched


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "is gated; accept its terms on the hub and set HF_TO"),
        (404, {"X-Error-Code": "RepoNotFound"}, "the hub has no such model"),
        (404, {"X-Error-Code": "RevisionNotFound"}, f"commit {COMMIT} cannot be read"),
        (500, {}, "cannot be read from the hub .*or copy the model to this machine"),
    ],
)
def test_the_hub_refuses(hub, out, status, headers, message):
    hub.refusal = (status, headers)
    refused(out, message)


def test_no_network(hub, out, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(out, "cannot be read from the hub .*actor_rollout_ref.model.path=FOLDER")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(out, "cannot be read from the hub .*actor_rollout_ref.model.path=FOLDER")


def test_what_the_cache_holds_needs_no_network(hub, out, monkeypatch):
    hub_policy.fetch(out, REPO, COMMIT)
    hub.refusal = (500, {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_policy.fetch(out.with_name("again"), REPO, COMMIT)
    assert hub_policy.read_manifest(out.with_name("again")) == hub_policy.read_manifest(out)


def test_too_little_room(hub, out, monkeypatch):
    usage = shutil.disk_usage(out.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    refused(out, r"needs 0\.0 GB; its disk has 0\.0 GB")
    assert not hub.fetched


def test_a_folder_that_is_in_use(hub, out):
    out.mkdir(parents=True)
    (out / "mine").write_text("x")
    with pytest.raises(DataError, match="is not empty"):
        hub_policy.fetch(out, REPO, COMMIT)
    assert [file.name for file in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    hub_policy.fetch(out, REPO, COMMIT)
    assert hub_policy.read_manifest(out)["revision"] == COMMIT


@pytest.mark.parametrize("manifest", [None, "{}", "[]", "no json", '{"files": {}}'])
def test_a_folder_that_was_not_fetched(tmp_path, manifest):
    if manifest is not None:
        (tmp_path / hub_policy.MANIFEST).write_text(manifest)
    with pytest.raises(DataError, match=r"fetched\.json: "):
        hub_policy.read_manifest(tmp_path)


@pytest.mark.parametrize("revision", ["main", COMMIT[:7]])
def test_a_revision_must_be_a_commit(out, capsys, revision):
    with pytest.raises(SystemExit) as ended:
        hub_policy.main(["--out", str(out), "--repo", REPO, "--revision", revision])
    assert ended.value.code == 2
    assert "is not a commit" in capsys.readouterr().err


@pytest.mark.parametrize("repo", ["a/b/c", "../b"])
def test_a_name_that_is_none_is_refused(out, repo):
    with pytest.raises(DataError, match="HFValidationError: Repo id must"):
        hub_policy.fetch(out, repo, COMMIT)


def test_the_manifest_names_what_was_fetched(hub, out):
    hub_policy.fetch(out, REPO, COMMIT)
    manifest = json.loads((out / hub_policy.MANIFEST).read_text())
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert manifest == {"repo": REPO, "revision": COMMIT, "files": digests}


WEIGHTS = sorted(name for name in FILES if name.endswith(".safetensors"))


@pytest.fixture
def start(hub, out, tmp_path, monkeypatch):
    """A function: what a start does with a policy of the hub; and the weights read meanwhile."""
    folder = tmp_path / "run"
    for name in ("train", "val"):
        (tmp_path / f"{name}.parquet").write_bytes(name.encode())
    config = OmegaConf.create(
        {
            "prepare": {
                "policy": {
                    "module": "data_prep.policies.hub",
                    "output": str(out),
                    "arguments": {"repo": REPO, "revision": COMMIT},
                }
            },
            "algorithm": {"adv_estimator": "a_hpo"},
            "data": {
                f"{name}_files": str(tmp_path / f"{name}.parquet") for name in ("train", "val")
            },
            "actor_rollout_ref": {
                "model": {"path": str(out)},
                "actor": {"policy_loss": {"loss_mode": "hpo"}, "loss_agg_mode": "token-mean"},
            },
            "trainer": {"nnodes": 1, "n_gpus_per_node": 1, "default_local_dir": str(folder)},
        }
    )
    read, whole = [], files.file_sha256

    def count(path):
        read.append(path.name)
        return whole(path)

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "READ_ONCE_BYTES", 128)
    monkeypatch.setattr(files, "_known", {})
    monkeypatch.setattr(files, "file_sha256", count)

    def run(launched=True):
        """Under `hpo-verl train`, or under stock verl, which makes nothing."""
        read.clear()
        if launched:
            make_missing(config, lambda text: None)
        (policy,) = preparations(config)
        if fault := policy.look()[1]:
            raise DataError(fault)
        _, manifest = checked_manifest(config, [])
        return manifest["policy"]["sha256"], [name for name in read if name in WEIGHTS]

    return run


def test_a_start_reads_the_weights_at_most_once(start, monkeypatch):
    """What the command has fetched, it has read; a later start reads it; so does stock verl."""
    fetched, read = start()
    assert read == []
    for launched in (True, False):
        monkeypatch.setattr(files, "_known", {})
        again, read = start(launched)
        assert (again, sorted(read)) == (fetched, WEIGHTS)


def test_weights_that_are_changed_between_two_starts_are_refused(start, out):
    start()
    path = out / WEIGHTS[0]
    changed = path.read_bytes()[:-1] + b"!"
    path.unlink()
    path.write_bytes(changed)
    for launched in (True, False):
        with pytest.raises(DataError, match="its sha256 is not the one in fetched"):
            start(launched)


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_folder_that_lost_its_files_is_fetched_again(start, out, is_empty):
    fetched, _ = start()
    for path in out.iterdir():
        if is_empty or path.suffix != ".json":
            path.unlink()
    if not is_empty:
        (out / WEIGHTS[0]).write_bytes(FILES[WEIGHTS[0]][:-1])
    assert start()[0] == fetched
