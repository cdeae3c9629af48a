"""No call in this package loads code or pickles of others; read from its source."""

import ast
from pathlib import Path

import pytest

import data_prep
import hpo_verl

PACKAGES = [Path(package.__file__).parent for package in (hpo_verl, data_prep)]
# They talk to the process that scores rewards, which this package starts.
PICKLING = {"hpo_verl/rewards/scoring_process.py", "hpo_verl/rewards/guarded_function.py"}
ABSENT = ast.Constant(None)


def calls():
    """File, name and keywords of every call."""
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                    where = path.relative_to(package.parent).as_posix()
                    yield where, ast.unparse(node.func), keywords


CALLS = list(calls())


def named(*ends):
    found = [call for call in CALLS if call[1].endswith(ends)]
    assert found, ends
    return found


def test_nothing_trusts_remote_code():
    named("from_pretrained", "hf_tokenizer")
    for where, name, keywords in CALLS:
        trust = keywords.get("trust_remote_code", ast.Constant(False))
        assert isinstance(trust, ast.Constant), (where, name)
        assert trust.value is False, (where, name)


def test_weights_are_read_from_safetensors_alone():
    for where, name, keywords in named("LM.from_pretrained"):
        # A GGUF holds tensors and settings, and no pickle either.
        if "gguf_file" in keywords:
            continue
        assert ast.unparse(keywords.get("use_safetensors", ABSENT)) == "True", (where, name)


def test_torch_loads_tensors_alone():
    for where, name, keywords in named("torch.load"):
        assert ast.unparse(keywords.get("weights_only", ABSENT)) == "True", (where, name)


def test_pickles_are_read_in_the_processes_of_the_reward_alone():
    readers = {where for where, name, _ in CALLS if name in ("pickle.loads", "pickle.load")}
    assert readers == PICKLING


@pytest.mark.parametrize("name", ["snapshot_download", "load_dataset", "dataset_info"])
def test_every_download_names_a_revision(name):
    for where, _, keywords in named(name):
        assert "revision" in keywords, (where, name)


def test_nothing_is_downloaded_as_a_whole():
    for where, name, keywords in named("snapshot_download"):
        assert "allow_patterns" in keywords, (where, name)


def test_temporary_files_have_names_that_nobody_can_guess():
    """Folders have mode 0700; `mktemp` gives a name alone. The doctor asks where."""
    used = {
        name.split(".")[1].split("(")[0] for _, name, _ in CALLS if name.startswith("tempfile.")
    }
    assert used == {"TemporaryDirectory", "TemporaryFile", "gettempdir", "mkdtemp"}
