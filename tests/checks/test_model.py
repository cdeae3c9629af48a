"""Policies that cannot be read, bring code, or are too short for the run."""

import json
import shutil
from dataclasses import replace

import pytest
from findings import only

from hpo_verl.checks.list import CHECKS, run_checks
from hpo_verl.checks.model_size import DeltaLayers, read_model_size
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


def test_a_decoder_inside_a_model_that_sees_images(policy):
    plain = read_model_size(policy)
    config = json.loads((policy / "config.json").read_text())
    whole = {"model_type": "qwen3_5", "text_config": config | {
        "layer_types": ["linear_attention"] + ["full_attention"] * (plain.layers - 1),
        "linear_num_key_heads": 1, "linear_num_value_heads": 2,
        "linear_key_head_dim": 3, "linear_value_head_dim": 5,
    }}  # fmt: skip
    (policy / "config.json").write_text(json.dumps(whole))
    size = read_model_size(policy)
    assert size == replace(plain, delta=DeltaLayers(1, 1, 2, 3, 5))
    assert size.cache_bytes_per_token * plain.layers == (
        plain.cache_bytes_per_token * (plain.layers - 1)
    )
    # float32 states, and three inputs of the convolution in bfloat16.
    assert size.delta.state_bytes == 4 * 2 * 3 * 5 + 2 * 3 * (3 + 3 + 10)
    del whole["text_config"]["linear_num_key_heads"]
    (policy / "config.json").write_text(json.dumps(whole))
    with pytest.raises(DataError, match=r"config\.json: has no linear_num_key_heads"):
        read_model_size(policy)


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


@pytest.fixture
def tokenizer(planned, policy):
    """A function: changes of the tokenizer's configuration -> the finding about it."""

    def run(changes=None, settings=None):
        path = policy / "tokenizer_config.json"
        content = json.loads(path.read_text())
        for key, value in (settings or {}).items():
            content.pop(key, None)
            if value is not None:
                content[key] = value
        path.write_text(json.dumps(content))
        wanted = [check for check in CHECKS if check.name == "tokenizer"]
        changed = planned({PATH: str(policy), **(changes or {})})
        return only(list(run_checks(changed, wanted)), "tokenizer")

    return run


def test_the_small_policys_tokenizer_is_right(tokenizer):
    finding = tokenizer()
    assert finding.status == "ok"
    assert finding.detail == "'<|im_end|>' ends a response, '<|endoftext|>' pads"


def test_a_tokenizer_without_a_chat_template(tokenizer, policy):
    (policy / "chat_template.jinja").unlink()
    finding = tokenizer()
    assert finding.status == "error"
    assert finding.detail == f"the tokenizer of {policy} has no chat template"
    own = {"actor_rollout_ref.model.custom_chat_template": "{{ messages[-1].content }}"}
    assert tokenizer(own).status == "ok"


def test_a_tokenizer_that_cannot_be_read(tokenizer, policy):
    (policy / "tokenizer.json").write_text("{")
    assert tokenizer().status == "error"


@pytest.fixture
def no_defaults(policy):
    """Settings of a tokenizer without names of its own; Qwen2's has some."""
    edit(policy / "config.json", model_type="llama")
    return {"tokenizer_class": "TokenizersBackend"}


def test_a_tokenizer_without_a_token_that_ends(tokenizer, no_defaults):
    finding = tokenizer(settings={**no_defaults, "eos_token": None})
    assert finding.status == "error"
    assert "names no token that ends a response (eos_token)" in finding.detail


def test_where_no_token_is_named_the_end_pads(tokenizer, no_defaults):
    finding = tokenizer(settings={**no_defaults, "pad_token": None})
    assert finding.status == "ok"
    assert finding.detail.endswith("'<|im_end|>' pads")


def test_an_end_that_no_answer_has(tokenizer, policy):
    path = policy / "generation_config.json"
    ends = json.loads(path.read_text())["eos_token_id"]
    edit(path, eos_token_id=None)
    finding = tokenizer(settings={"eos_token": "<|im_start|>"})
    assert finding.status == "warning"
    expected = (
        "'<|im_start|>' ends a response, but the chat template ends an answer with '<|im_end|>"
    )
    assert expected in finding.detail
    # Llama's has several: one of them is enough.
    edit(path, eos_token_id=[0, ends])
    assert tokenizer().status == "ok"
