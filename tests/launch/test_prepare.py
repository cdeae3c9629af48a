"""What a recipe needs is made once, by its own command, and checked before reuse."""

import sys

import pytest
from omegaconf import OmegaConf

from data_prep.countdown import __main__ as countdown
from data_prep.policies import tiny as tiny_policy
from hpo_verl.child import module_arguments
from hpo_verl.config.prepare import check_made, make_missing, missing, preparations
from hpo_verl.errors import ConfigError, DataError


def recipe(folder, **arguments):
    entry = {"module": "data_prep.countdown", "output": str(folder), "arguments": arguments}
    data = {"train_files": f"{folder}/train.parquet"}
    return OmegaConf.create({"prepare": {"data": entry}, "data": data})


def test_the_command_is_the_one_a_user_types(tmp_path):
    (only,) = preparations(recipe(tmp_path / "data", train_size=8, val_size=2))
    out = str(tmp_path / "data")
    arguments = ["-m", "data_prep.countdown", "--out", out, "--train-size", "8", "--val-size", "2"]
    assert only.command == [sys.executable, *module_arguments(only.module), *arguments[2:]]
    assert only.shown == " ".join(["python", *arguments])


def test_missing_data_is_made_once(tmp_path):
    config = recipe(tmp_path / "data", train_size=8, val_size=2, max_number=9, max_target=50)
    told = []
    make_missing(config, told.append)
    assert (tmp_path / "data" / "train.parquet").is_file()
    assert len(told) == 1
    make_missing(config, told.append)
    assert len(told) == 1
    assert missing(config) == []


def test_a_failing_command_is_named(tmp_path):
    config = recipe(tmp_path / "data", train_size=0)
    with pytest.raises(DataError, match=r"prepare\.data: exit code 2 from python -m"):
        make_missing(config, lambda text: None)
    assert not (tmp_path / "data").exists()


def test_what_the_recipe_does_not_read_is_not_made(tmp_path):
    config = recipe(tmp_path / "data")
    config.data.train_files = str(tmp_path / "data-of-mine" / "train.parquet")
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


def test_what_was_made_is_checked_by_its_own_module(tmp_path, monkeypatch):
    assert not hasattr(countdown, "check")
    checked = []
    monkeypatch.setattr(tiny_policy, "check", checked.append)
    (tmp_path / "policy").mkdir()
    config = recipe(tmp_path / "policy")
    config.prepare.data.module = "data_prep.policies.tiny"
    check_made(config)
    config.prepare.data.output = str(tmp_path / "absent")
    check_made(config)
    assert checked == [tmp_path / "policy"]


def test_recipes_without_preparations_need_none():
    assert list(preparations(OmegaConf.create({}))) == []
