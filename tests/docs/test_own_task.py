"""The page on one's own task, followed to the letter up to the training."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep import rows
from data_prep.command import run
from hpo_verl.checks.finding import raise_first_error
from hpo_verl.checks.list import ANYWHERE, BEFORE_RAY, run_checks
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.cli import app
from hpo_verl.launch.new_task import TEMPLATES

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "own-task.md"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The page's commands in their order; the working folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path / "cache"))
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def follow(command):
    """Give a command as the page does; what it says."""
    if command[:3] == ["python", "-m", "data_prep.rows"]:
        assert run(rows.main, command[3:]) == 0
        return ""
    assert command[0] == "hpo-verl"
    result = CliRunner().invoke(app, command[1:])
    return result.stdout


def test_the_page_shows_the_files_that_init_writes():
    shown = dict(re.findall(r'```\w+ title="my-task/(\S+)"\n(.*?)```', PAGE.read_text(), re.DOTALL))
    assert shown.keys() == {"rows.jsonl", "reward.py", "run.py", "real.yaml"}
    assert (TEMPLATES / "rows.jsonl").read_text().startswith(shown["rows.jsonl"])
    assert (TEMPLATES / "run.py").read_text() == shown["run.py"]
    assert (TEMPLATES / "reward.py").read_text().endswith(f"\n{shown['reward.py']}")


def test_the_commands_in_their_order(commands, tmp_path):
    assert [command[1] for command in commands] == [
        *("init", "-m", "prepare", "doctor", "train", "train", "report", "my-task/run.py"),
    ]
    for command in commands[:2]:
        follow(command)
    assert (tmp_path / "my-task" / "try" / "val.parquet").is_file()
    # In the place of `prepare`, whose policy takes a minute.
    follow([*commands[1][:-1], "my-task/data"])
    findings = json.loads(follow([*commands[3], "--json"]))["findings"]
    assert [one["name"] for one in findings if one["status"] == "error"] == ["model"]
    [reward] = [one for one in findings if one["name"] == "reward"]
    assert reward["status"] == "ok"
    assert "up to 1 for the known answer in all 10" in reward["detail"]
    for command in commands[4:6]:
        overrides = [word for word in command[3:] if word != "--show-samples"]
        planned = PlannedRun(command[2], tuple(overrides))
        assert raise_first_error(run_checks(planned, (c for c in ANYWHERE if not c.needs))) != []
        assert planned.run_folder.parent == tmp_path / "my-task" / "runs"


def test_the_script_makes_rows_and_trains_on_them(commands, tmp_path, monkeypatch, capsys):
    def train(recipe, overrides):
        planned = PlannedRun(recipe, tuple(overrides))
        raise_first_error(
            run_checks(planned, (c for c in BEFORE_RAY if c.needs in ((), ("data",))))
        )
        assert [sample.rows for sample in planned.rows.values()] == [170, 40]
        summary = {"success_before": 0.125, "success_after": 0.5}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        return tmp_path

    monkeypatch.setattr("hpo_verl.launch.train.train", train)
    follow(commands[0])
    runpy.run_path(commands[-1][1], run_name="__main__")
    assert capsys.readouterr().out.endswith(f"12.5% before, 50.0% after: {tmp_path}\n")


def test_the_recipe_of_a_real_model_is_one(commands, tmp_path):
    [text] = re.findall(r'```yaml title="my-task/real.yaml"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    (tmp_path / "my-task").mkdir()
    file = tmp_path / "my-task" / "real.yaml"
    file.write_text(text)
    (tmp_path / "my-task" / "reward.py").write_text("")
    for hardware in ("8gpu", "1gpu"):
        planned = PlannedRun("my-task/real.yaml", (f"hardware={hardware}",))
        raise_first_error(run_checks(planned, (c for c in ANYWHERE if not c.needs)))
        assert planned.get("trainer.experiment_name").startswith("larger_number-qwen2.5-1.5b-a_hpo")
