"""No process of ours runs a file of the user's that is called like a module it imports."""

import subprocess
import sys

import pytest

from hpo_verl.child import module_arguments
from hpo_verl.rewards.guarded_function import GuardedFunction, RewardGuardSettings

SAME_NAMES = ("types", "queue", "numbers", "random", "torch", "data_prep")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in SAME_NAMES:
        (tmp_path / f"{name}.py").write_text("open('executed', 'a').write(__name__)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_module_of_the_package_imports_nothing_of_the_working_folder(folder):
    command = [sys.executable, *module_arguments("data_prep.countdown"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "--out DIR" in result.stdout) == (0, True), result.stderr
    assert not (folder / "executed").exists()


def test_a_folder_in_pythonpath_keeps_its_place(tmp_path, monkeypatch):
    for name in ("work", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chosen_module.py").write_text(f"NAME = {name!r}\n")
        (tmp_path / name / "r.py").write_text(
            "import chosen_module\ndef score(**_): return float(chosen_module.NAME == 'work')\n"
        )
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(tmp_path / "other")
    monkeypatch.syspath_prepend(tmp_path / "work")

    def found():
        function = GuardedFunction("r.py", "score", RewardGuardSettings())
        ((result, _),) = function.score([{}])
        function.close()
        return "work" if result["acc"] else "other"

    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert found() == "other"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "work"))
    assert found() == "work"


def test_a_reward_finds_its_neighbours_and_python_its_own_modules(folder):
    (folder / "neighbour_of_mine.py").write_text("VALUE = 0.5\n")
    text = "import types, numbers, random, neighbour_of_mine\n"
    (folder / "r.py").write_text(f"{text}def score(**_): return neighbour_of_mine.VALUE\n")
    function = GuardedFunction("r.py", "score", RewardGuardSettings())
    answers = function.score([{}])
    function.close()
    assert [result["acc"] for result, _ in answers] == [0.5]
    assert not (folder / "executed").exists()
