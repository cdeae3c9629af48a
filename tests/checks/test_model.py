"""Policies that cannot be read, bring code, or are too short for the run."""

import json
import shutil

import pytest
from findings import only

from hpo_verl.checks.list import CHECKS, run_checks
from hpo_verl.checks.memory import read_model_size
from hpo_verl.errors import DataError

HUB = "Qwen/Qwen2.5-1.5B-Instruct"
PATH = "actor_rollout_ref.model.path"


@pytest.fixture
def policy(made, tmp_path):
    """A copy of the policy that a test may damage."""
    return shutil.copytree(made / "policy", tmp_path / "policy")


@pytest.fixture
def examine(planned):
    def run(changes=None, **options):
        wanted = [check for check in CHECKS if check.name in ("model", "remote code", "positions")]
        return list(run_checks(planned(changes, **options), wanted))

    return run


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_small_policy_is_right(examine, policy):
    findings = examine({PATH: str(policy)})
    assert [f.status for f in findings] == ["ok"] * 3
    assert only(findings, "positions").detail == "40 of 512"


def test_its_size_is_read_from_the_headers(policy):
    size = read_model_size(policy)
    config = json.loads((policy / "config.json").read_text())
    assert size.parameters == json.loads((policy / "manifest.json").read_text())["parameters"]
    assert (size.hidden_size, size.layers) == (config["hidden_size"], config["num_hidden_layers"])
    assert not size.tied
    # Keys and values of every layer in two bytes a number.
    numbers = config["num_hidden_layers"] * config["num_key_value_heads"] * size.head_size
    assert size.cache_bytes_per_token == 2 * 2 * numbers
    matrices = 2 * config["vocab_size"] * config["hidden_size"]
    assert size.layer_parameters == (size.parameters - matrices) / size.layers


def test_a_shared_matrix_that_is_stored_twice_counts_once(policy):
    whole = read_model_size(policy)
    edit(policy / "config.json", tie_word_embeddings=True)
    size = read_model_size(policy)
    assert size.tied
    assert size.parameters == whole.parameters - size.vocabulary * size.hidden_size
    assert size.layer_parameters == whole.layer_parameters


@pytest.mark.parametrize("damage", ["{}", "[]", "no json"])
def test_a_configuration_without_dimensions(policy, damage):
    (policy / "config.json").write_text(damage)
    with pytest.raises(DataError, match=r"config\.json"):
        read_model_size(policy)


def test_a_folder_without_weights_has_no_size(policy):
    (policy / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        read_model_size(policy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder(examine, policy, name):
    (policy / name).unlink()
    finding = only(examine({PATH: str(policy)}), "model")
    assert finding.status == "error"
    assert f"{PATH}: {policy} holds no" in finding.detail
    assert finding.fix == f"copy the model there, or {PATH}=FOLDER"


def test_a_policy_that_was_changed_after_it_was_made(examine, policy):
    edit(policy / "generation_config.json", temperature=2.0)
    changes = {PATH: str(policy), "prepare.policy.output": str(policy)}
    finding = only(examine(changes), "model")
    assert finding.status == "error"
    assert "generation_config.json: its sha256" in finding.detail
    assert f"or move {policy} away, then hpo-verl prepare countdown-tiny" in finding.fix


def test_a_shard_that_the_index_names(examine, policy):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (policy / "model.safetensors.index.json").write_text(json.dumps(index))
    finding = only(examine({PATH: str(policy)}), "model")
    assert (finding.status, "holds no model-2.safetensors" in finding.detail) == ("error", True)


def test_a_model_that_brings_code(examine, policy):
    edit(policy / "config.json", auto_map={"AutoConfig": "own.Config"})
    (policy / "own.py").write_text("")
    finding = only(examine({PATH: str(policy)}), "remote code")
    assert finding.status == "error"
    assert f"{PATH}: {policy / 'config.json'} names code to execute" in finding.detail


def test_a_model_for_shorter_texts(examine, policy):
    edit(policy / "config.json", max_position_embeddings=39)
    finding = only(examine({PATH: str(policy)}), "positions")
    assert (finding.status, "= 40: the model has 39" in finding.detail) == ("error", True)
    config = json.loads((policy / "config.json").read_text())
    del config["max_position_embeddings"]
    (policy / "config.json").write_text(json.dumps(config))
    assert only(examine({PATH: str(policy)}), "positions").status == "skipped"


def test_a_model_that_was_not_fetched_yet(examine, planned, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    findings = examine(recipe="countdown3-1.5b", hardware="8gpu")
    finding = only(findings, "model")
    assert finding.status == "error"
    assert f"{tmp_path}/hpo_verl/{HUB}/" in finding.detail
    assert finding.fix.startswith("hpo-verl prepare countdown3-1.5b")
    assert only(findings, "remote code").status == "skipped"
    assert only(findings, "positions").status == "skipped"
    assert planned(recipe="countdown3-1.5b", hardware="8gpu").size is None


def test_a_name_on_the_hub(examine):
    finding = only(examine({PATH: HUB}, recipe="countdown3-1.5b", hardware="8gpu"), "model")
    assert finding.status == "error"
    assert f"{PATH}: {HUB} is not a folder; a model of the hub is fetched at a" in finding.detail
