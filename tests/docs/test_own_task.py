"""The page on one's own task, followed to the letter up to the training."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo_verl.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "own-task.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a blank in its name that holds the page's two files and what one makes."""
    folder = tmp_path_factory.mktemp("own task")
    blocks = re.findall(r'```python title="(\S+)"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["make_data.py", "reward.py"]
    for name, text in blocks:
        (folder / name).write_text(text)
    environment = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "make_data.py"], cwd=folder, env=environment, check=True)
    return folder


def test_the_doctor_finds_nothing_wrong_but_the_policy_that_is_not_made_yet(
    folder, tmp_path, monkeypatch
):
    [block] = re.findall(r'TASK="(.*?)"', PAGE.read_text(), re.DOTALL)
    overrides = [text.replace("$PWD", str(folder)) for text in block.split()]
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "countdown-tiny", *overrides, "--json"])
    findings = json.loads(result.stdout)["findings"]
    assert [one["name"] for one in findings if one["status"] == "error"] == ["model"]
    [reward] = [one for one in findings if one["name"] == "reward"]
    assert reward["status"] == "ok"
    assert "up to 1 for the known answer in all 100" in reward["detail"]
