"""`hpo-verl init`: what it writes, and where it writes nothing."""

import json
import os
import sys

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from data_prep.rows import main as make_rows
from hpo_verl.checks.prepare import preparations
from hpo_verl.cli import app, main
from hpo_verl.config.recipes import compose_recipe, without_hydra
from hpo_verl.rewards.guarded_function import GuardedFunction, RewardGuardSettings

FILES = {"recipe.yaml", "reward.py", "rows.jsonl", "run.py"}


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def refusal(monkeypatch, capsys, folder):
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "init", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize("name", ["mine", "a b 'q' \"ü\" {c} #:, \\d", "true"])
def test_the_recipe_names_its_own_files_wherever_the_folder_lies(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("init", name)
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 5)
    folder = tmp_path / name
    assert {path.name for path in folder.iterdir()} == FILES
    monkeypatch.chdir("/")
    config = without_hydra(compose_recipe(f"{folder}/recipe.yaml", []))
    OmegaConf.resolve(config)
    assert config.reward.custom_reward_function.path == f"{folder}/reward.py"
    data, policy = preparations(config)
    assert policy.output == folder / "policy"
    make_rows(["--out", str(data.output), *(t for pair in data.arguments.items() for t in pair)])
    assert config.data.train_files == f"{folder}/data/train.parquet"
    assert (folder / "data" / "train.parquet").is_file()


def test_the_reward_scores_the_rows(tmp_path):
    assert invoke("init", tmp_path / "mine").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "mine" / "rows.jsonl").open()]
    assert len(rows) == 10
    function = GuardedFunction(
        str(tmp_path / "mine" / "reward.py"), "compute_score", RewardGuardSettings()
    )
    texts = [(f"<answer>7*{row['answer']}</answer>", row) for row in rows] + [
        ("", rows[0]),
        ("x", rows[0]),
    ]
    scores = function.score(
        [
            {"data_source": "x", "solution_str": text, "ground_truth": row["answer"]}
            for text, row in texts
        ]
    )
    function.close()
    assert scores == [({"score": 1.0}, "")] * 10 + [({"score": 0.0}, "")] * 2


def test_an_empty_folder_is_filled_and_another_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke("init", ".").exit_code == 0
    (tmp_path / "reward.py").write_text("mine")
    assert refusal(monkeypatch, capsys, ".").startswith("error: . is not empty; ")
    assert (tmp_path / "reward.py").read_text() == "mine"
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".x").write_text("")
    assert "hidden is not empty" in refusal(monkeypatch, capsys, "hidden")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a [b]", "must hold no *, ?, [ ] or :: in its path"),
        ("a${b}", "cannot name a folder with ${"),
        ("a\nb", "control"),
        ("file", "is a file"),
    ],
)
def test_a_folder_that_cannot_be(name, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert message in refusal(monkeypatch, capsys, tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]
