"""Recipes that are files of the user's own, wherever they lie."""

import shlex
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.recipes import (
    compose_recipe,
    from_anywhere,
    hydra_arguments,
    recipe_file,
    verl_configurations,
    without_hydra,
)
from hpo_verl.errors import ConfigError

BASE = "defaults: [countdown-tiny, _self_]\nseed: 3\n"
# Folders and files may be called anything but `${`.
ODD = ["my recipe", "x [1]", "ü漢", "a,b", "it's", "a=b", "a.b", "a@b:c", "$x", "{a}(b)#%20", "-x"]


@pytest.fixture
def folder(tmp_path):
    """A folder with a task of its own, named so that Hydra refuses it as it is."""
    folder = tmp_path / "a [b] 'q' {c} ü@:$.yaml"
    (folder / "task").mkdir(parents=True)
    (folder / "task" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [countdown_tiny, _self_]\ndata: {max_prompt_length: 17}\n"
    )
    return folder


@pytest.mark.parametrize("name", ODD)
def test_a_recipe_may_have_any_name_and_lie_anywhere(name, folder):
    file = folder / f"{name}.yaml"
    file.write_text(BASE)
    config = compose_recipe(str(file), ["algo=grpo"])
    assert (config.seed, config.algorithm.adv_estimator) == (3, "grpo")
    assert config.hydra.job.config_name == name


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (BASE, ["task=mine"]),
        ("defaults: [countdown-tiny, override task: mine, _self_]", []),
        (
            "defaults: [ppo_trainer, run: tiny, task: mine, model: tiny, algo: grpo, "
            "hardware: cpu, _self_]",
            [],
        ),
    ],
)
def test_groups_of_ones_own_lie_beside_the_recipe(text, overrides, folder):
    file = folder / "mine.yaml"
    file.write_text(text)
    assert compose_recipe(str(file), overrides).data.max_prompt_length == 17
    with pytest.raises(ConfigError, match="task=mien: no such task; did you mean mine"):
        compose_recipe(str(file), ["task=mien"])


def test_a_recipe_for_gpus_keeps_what_a_model_needs_on_a_machine(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("defaults: [countdown3-1.5b, override model: qwen2.5-3b, _self_]\n")
    theirs = compose_recipe("countdown3-1.5b", ["model=qwen2.5-3b", "hardware=1gpu"])
    assert without_hydra(compose_recipe(str(file), ["hardware=1gpu"])) == without_hydra(theirs)


@pytest.mark.parametrize("recipe", ["countdown-tiny", "{folder}/-my recipe.yaml"])
def test_a_program_of_hydra_composes_what_the_launcher_does(recipe, folder):
    recipe = recipe.format(folder=folder)
    (folder / "-my recipe.yaml").write_text(BASE)
    # A group of the same name as one of ours comes first, in both.
    (folder / "model").mkdir()
    (folder / "model" / "tiny.yaml").write_text("# @package _global_\nseed: 4\n")
    program = (
        f"import hydra; hydra.main(config_path={str(verl_configurations())!r}, "
        "config_name='ppo_trainer', version_base=None)(print)()"
    )
    arguments = [*hydra_arguments(recipe), "--cfg=job"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert OmegaConf.create(done.stdout) == without_hydra(compose_recipe(recipe, []))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [\n", [], "{file}: line 2, column 1: expected the node content"),
        (f"{BASE}seed: 4\n", [], "{file}: line 3, column 1: found duplicate key seed"),
        (f"{BASE}\x00", [], "{file}: unacceptable character"),
        ("", [], "{file}: builds on no recipe; begin it with `defaults: [countdown-tiny, _self_]`"),
        ("- a\n", [], "{file}: builds on no recipe"),
        ("seed: 3\n", ["seed=4"], "{file}: builds on no recipe"),
        ("defaults: [_self_]\n", [], "{file}: builds on no recipe"),
        ("defaults: [ppo_trainer, _self_]\n", [], "{file}: builds on no recipe"),
        ("defaults: 3\n", [], "{file}: Invalid defaults list"),
        ("defaults: [countdown-tny, _self_]\n", [], "Could not load 'countdown-tny'"),
        ("defaults: [mine, _self_]\n", [], "{file}: builds on itself"),
        (f"{BASE}hydra: {{searchpath: [a]}}\n", [], "groups of your own lie beside your recipe"),
        (BASE, ["hydra.searchpath=[a]"], "groups of your own lie beside your recipe"),
        (BASE, ["--config-dir", "a"], "--config-dir: groups of your own lie beside your recipe"),
        (BASE, ["task=broken"], "task/broken.yaml, line 1, column 4: "),
        (BASE, ["data.max_prompt_lenth=3"], "did you mean data.max_prompt_length"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_one_line(text, overrides, message, folder):
    file = folder / "mine.yaml"
    file.write_text(text)
    (folder / "task" / "broken.yaml").write_text("a: }")
    with pytest.raises(ConfigError) as refused:
        compose_recipe(str(file), overrides)
    assert message.format(file=file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mien.yaml", "no such file; did you mean mine.yaml"),
        ("mine.yml", "must be a file NAME.yaml"),
        ("mine", "must be a file NAME.yaml"),
        ("task", "must be a file NAME.yaml"),
        ("nowhere/mine.yaml", "no such file"),
        ("${x}.yaml", "must have no ${ in its path"),
    ],
)
def test_what_is_no_recipe_is_refused(name, message, folder):
    (folder / "mine.yaml").write_text(BASE)
    with pytest.raises(ConfigError) as refused:
        recipe_file(f"{folder}/{name}")
    assert message in str(refused.value)


def test_a_file_that_cannot_be_read_as_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"mine.yaml: 'utf-8' codec can't decode"):
        compose_recipe(f"{tmp_path}/mine.yaml", [])


def test_a_file_here_needs_no_folder_and_is_named_in_commands(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    (folder / "mine.yaml").write_text(BASE)
    output = f"prepare.data.output={tmp_path / 'data'}"
    run = PlannedRun("mine.yaml", (output,))
    assert run.get("seed") == 3
    command = run.how_to_make(tmp_path / "data" / "train.parquet", "?")
    assert shlex.split(command) == ["hpo-verl", "prepare", "mine.yaml", output]
    # A job starts in another folder.
    assert from_anywhere("mine.yaml") == f"{folder}/mine.yaml"
    assert from_anywhere("countdown-tiny") == "countdown-tiny"
