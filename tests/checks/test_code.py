"""Code of others that a configuration would run is found before anything runs it."""

import json
import shutil

import pytest
from omegaconf import OmegaConf
from wrong_settings import LOADED_CODE_OF_OTHERS

from hpo_verl.checks.loaded import check_loaded_code, check_model_code, check_targets
from hpo_verl.errors import DataError


def test_what_verl_hydra_and_this_package_name_is_permitted():
    finding = check_targets(
        {
            "a": {"_target_": "verl.workers.config.FSDPActorConfig"},
            "b": [{"_target_": "hpo_verl.launch.preflight.Preflight"}],
            "hydra": {
                "launcher": {
                    "_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
                }
            },
        }
    )
    assert finding.status == "ok"
    assert finding.detail.startswith("3 ")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "verlx.evil",
        "hpo_verl_evil.run",
        "builtins.exec",
        "hydra.utils.call",
        "hydra._internal.utils._locate",
        "omegaconf.OmegaConf.load",
        "${oc.env:TARGET}",
        "verl..os.system",
    ],
)
def test_any_other_target_is_named(target):
    finding = check_targets({"actor": [{"x": {"_target_": target}}]})
    assert finding.status == "error"
    assert f"actor.0.x._target_={target}" in finding.detail


def test_nothing_but_our_own_code(planned):
    assert check_loaded_code(OmegaConf.to_container(planned().config)).status == "ok"


def test_a_file_of_the_users_is_shown_and_a_missing_one_is_an_error(tmp_path):
    file = tmp_path / "mine.py"
    config = {"reward": {"custom_reward_function": {"path": str(file)}}}
    assert check_loaded_code(config).status == "error"
    assert "no such file" in check_loaded_code(config).detail
    file.write_text("raise SystemExit('this was executed')")
    finding = check_loaded_code(config)
    assert finding.status == "warning"
    assert f"reward.custom_reward_function.path={file} will be executed" in finding.detail


@pytest.mark.parametrize(("changes", "words"), LOADED_CODE_OF_OTHERS)
def test_code_of_others(planned, changes, words):
    finding = check_loaded_code(OmegaConf.to_container(planned(changes).config))
    assert finding.status == "error"
    assert words in finding.detail
    (key,) = changes
    assert (finding.fix == f"{key}=false") == key.endswith("trust_remote_code")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", json.dumps({"auto_map": {"AutoModel": "m.M"}})),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}})),
        ("modeling_own.py", "pass"),
    ],
)
def test_a_model_that_brings_code(planned, made, tmp_path, name, text):
    folder = shutil.copytree(made / "policy", tmp_path / "policy")
    run = planned({"actor_rollout_ref.model.path": str(folder)})
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    assert check_model_code(run).status == "ok"
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=r"actor_rollout_ref\.model\.path: .*" + name):
        check_model_code(run)
