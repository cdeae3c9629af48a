"""What a recipe needs is made once, by its own command, and again where it is damaged."""

import json
import re
import shutil
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from data_prep.policies import tiny as tiny_policy
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.prepare import make_missing, missing, preparations
from hpo_verl.child import module_arguments
from hpo_verl.config.recipes import group_options
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.runs.files import file_sha256

SMALL = {"train_size": 8, "val_size": 2, "max_number": 9, "max_target": 50}
EVERY = {"prepared.json", "train.parquet", "val.parquet"}


def recipe(folder, **arguments):
    entry = {"module": "data_prep.countdown", "output": str(folder), "arguments": arguments}
    data = {"train_files": f"{folder}/train.parquet", "val_files": f"{folder}/val.parquet"}
    return OmegaConf.create({"prepare": {"data": entry}, "data": data})


def policy_recipe(folder, **arguments):
    entry = {"module": "data_prep.policies.tiny", "output": str(folder), "arguments": arguments}
    model = {"model": {"path": str(folder)}}
    return OmegaConf.create({"prepare": {"policy": entry}, "actor_rollout_ref": model})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def look(config):
    (only,) = preparations(config)
    return only.look()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Data that the recipe has made; nobody changes them."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    make_missing(recipe(folder, **SMALL), lambda text: None)
    return folder


@pytest.fixture
def data(prepared, tmp_path):
    """The same data, to be changed."""
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    return folder


def test_the_command_is_the_one_a_user_types(tmp_path):
    config = recipe(tmp_path / "data", train_size=8, val_size=2, seed=None)
    (only,) = preparations(config)
    out = str(tmp_path / "data")
    arguments = ["-m", "data_prep.countdown", "--out", out, "--train-size", "8", "--val-size", "2"]
    assert only.command() == [sys.executable, *module_arguments(only.module), *arguments[2:]]
    assert only.shown == " ".join(["python", *arguments])


def test_missing_data_is_made_once(tmp_path):
    # A link to a disk that has no such folder yet.
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    config = recipe(tmp_path / "data", **SMALL)
    told = []
    make_missing(config, told.append)
    assert contents(tmp_path / "disk").keys() == EVERY
    assert told[0].startswith("making data: python -m data_prep.countdown ")
    assert told[1].startswith(f"{tmp_path / 'data' / 'train.parquet'}: 8 puzzles")
    before = len(told)
    make_missing(config, told.append)
    assert (len(told), missing(config)) == (before, [])
    assert {path.name for path in tmp_path.iterdir()} == {"data", "disk", ".disk.lock"}


def test_two_at_once_make_it_once(tmp_path):
    config = recipe(tmp_path / "data", **SMALL)
    (one,) = missing(config)
    told = []
    # Both have seen that nothing is there.
    threads = [threading.Thread(target=one.make, args=(told.append,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line.split(":")[0] for line in told].count("making data") == 1
    assert look(config) == (False, "")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
    ("damage", "is_kept"),
    [
        (Path.unlink, False),
        (link_to_nowhere, False),
        (cut, True),
        (lambda path: path.write_bytes(b""), True),
        (lambda path: path.write_text("notes of mine"), True),
    ],
)
def test_what_is_gone_or_breaks_off_is_made_again(damage, is_kept, data, tmp_path):
    before = contents(data)
    (data / "notes.txt").write_text("mine")
    damage(data / "val.parquet")
    damaged = (data / "val.parquet").read_bytes() if is_kept else None
    config = recipe(data, **SMALL)
    make_missing(config, lambda text: None)
    assert contents(data) == {**before, "notes.txt": b"mine"}
    kept = [path.read_bytes() for path in tmp_path.glob("data.broken-*/val.parquet")]
    assert kept == ([damaged] if is_kept else [])
    assert look(config) == (False, "")


def own_rows(folder):
    table = pq.read_table(folder / "train.parquet")
    pq.write_table(table.slice(1), folder / "train.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (own_rows, r"train\.parquet: its sha256 is not the one in prepared\.json"),
        (lambda folder: (folder / "prepared.json").unlink(), r"train\.parquet was not made by hpo"),
        (lambda folder: (folder / "prepared.json").write_text("["), r"prepared\.json was not made"),
    ],
)
def test_nothing_is_written_over_that_was_not_made(change, message, data):
    change(data)
    (data / "val.parquet").unlink()
    before = contents(data)
    config = recipe(data, **SMALL)
    with pytest.raises(DataError, match=f"{message}.*; name another .* or move {data} away"):
        make_missing(config, lambda text: None)
    assert contents(data) == before
    assert re.search(message, look(config)[1])


def test_data_of_ones_own_are_read_as_they_are(data):
    (data / "prepared.json").unlink()
    own_rows(data)
    assert look(recipe(data, train_size=3)) == (False, "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_size": 9}, "--train-size 8, now 9"),
        ({"train_size": None}, "--train-size 8, now left out"),
        ({"seed": 1}, "--seed left out, now 1"),
    ],
)
def test_other_arguments_are_noticed(changes, said, data):
    before = contents(data)
    config = recipe(data, **{**SMALL, **changes})
    assert look(config) == (False, f"{data} was made with {said}")
    make_missing(config, lambda text: None)
    assert contents(data) == before


def test_a_file_counts_by_its_content_and_a_policy_by_its_version(data, tmp_path):
    policy, puzzles = tmp_path / "policy", data / "val.parquet"
    arguments = {"--held-out": f"sha256:{file_sha256(puzzles)}"}
    manifest = {"recipe_version": tiny_policy.RECIPE_VERSION, "arguments": arguments, "files": {}}
    policy.mkdir()
    (policy / tiny_policy.MANIFEST).write_text(json.dumps(manifest))
    moved = puzzles.rename(tmp_path / "moved.parquet")
    assert look(policy_recipe(policy, held_out=str(moved))) == (False, "")
    # What is gone cannot be compared.
    assert look(policy_recipe(policy, held_out=str(puzzles))) == (False, "")
    for other in (data / "train.parquet", None):
        config = policy_recipe(policy, held_out=other and str(other))
        assert f"was made with --held-out {arguments['--held-out']}, now " in look(config)[1]
    manifest["recipe_version"] = 1
    (policy / tiny_policy.MANIFEST).write_text(json.dumps(manifest))
    assert "was made with recipe_version 1, now " in look(policy_recipe(policy))[1]


def test_what_a_failing_command_says_is_the_only_message(tmp_path, capfd):
    config = recipe(tmp_path / "data", train_size=0)
    with pytest.raises(DataError) as failed:
        make_missing(config, lambda text: None)
    assert str(failed.value).startswith(
        "prepare.data: argument --train-size: '0' is not an integer from 1 to 5000000 (see --help)"
        ", from python -m data_prep.countdown --out "
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "3 4", "answer": "4"}\n{"question": "5 6"}\n')
    config.prepare.data.update(module="data_prep.rows", arguments={"source": str(rows)})
    with pytest.raises(DataError) as failed:
        make_missing(config, lambda text: None)
    assert str(failed.value).startswith(f"prepare.data: {rows}: row 2, column 'answer': is missing")
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "data").exists()


def test_what_the_recipe_does_not_read_is_not_made(tmp_path):
    config = recipe(tmp_path / "data")
    for key in ("train_files", "val_files"):
        config.data[key] = str(tmp_path / "data-of-mine" / "train.parquet")
    assert list(preparations(config)) == []
    # A folder itself, as a policy's, and one that another command reads.
    config.data.folder = str(tmp_path / "data")
    assert len(missing(config)) == 1
    config.data.folder = None
    config.prepare.policy = {
        "module": "data_prep.policies.tiny",
        "output": str(tmp_path / "policy"),
        "arguments": {"held_out": str(tmp_path / "data" / "val.parquet")},
    }
    config.actor_rollout_ref = {"model": {"path": str(tmp_path / "policy")}}
    assert [made.name for made in preparations(config)] == ["data", "policy"]


def test_only_modules_of_data_prep(tmp_path):
    config = recipe(tmp_path)
    config.prepare.data.module = "os"
    with pytest.raises(ConfigError, match=r"prepare\.data\.module=os: only modules below"):
        list(preparations(config))


def test_recipes_without_preparations_need_none():
    assert list(preparations(OmegaConf.create({}))) == []


@pytest.mark.parametrize("task", ["countdown_tiny", "telelogs_tiny", "countdown3"])
def test_every_model_goes_with_a_task_and_gets_what_its_command_knows(task, monkeypatch, tmp_path):
    for name in ("HPO_VERL_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    recipe = "countdown3-1.5b" if task == "countdown3" else "countdown-tiny"
    for model in group_options("model"):
        if (recipe, model) != ("countdown3-1.5b", "tiny"):
            run = PlannedRun(recipe, (f"model={model}", f"task={task}"))
            made = {one.name: one for one in preparations(run.config)}
            assert list(made) == ["data", "policy"]
            given = {text for text in made["policy"].command() if text.startswith("--")}
            tiny = {"--task", "--held-out"} if task == "countdown_tiny" else {"--task"}
            assert given & {"--task", "--held-out"} == (tiny if model == "tiny" else set())


def test_an_argument_or_a_command_that_does_not_exist_is_refused(tmp_path):
    config = recipe(tmp_path / "data", **SMALL, prompts="tiny")
    with pytest.raises(ConfigError) as refused:
        list(preparations(config))
    assert str(refused.value).startswith(
        "prepare.data.arguments.prompts=tiny: data_prep.countdown takes no such argument; "
        "available: prompt, train_size, "
    )
    for module in ("data_prep.rowz", "data_prep.splits"):
        config.prepare.data.module = module
        with pytest.raises(ConfigError, match=f"prepare.data.module={module}: there is no such"):
            list(preparations(config))
