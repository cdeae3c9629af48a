"""The contracts of imports name every room; `lint-imports` checks the rest."""

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hpo_verl"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]


def contract(name):
    (found,) = [entry for entry in CONTRACTS if entry["name"] == name]
    return found


def rooms():
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    names |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return {f"hpo_verl.{name}" for name in names} | {"data_prep"}


def test_every_room_has_its_layer():
    layers = contract("Imports point down only")["layers"]
    assert {name for layer in layers for name in re.split(r" \| ", layer)} == rooms()


@pytest.mark.parametrize(
    ("name", "permitted"),
    [
        ("Only verl_plugin and lab import verl", {"verl_plugin", "lab"}),
        ("Only launch, checks and verl_plugin import ray", {"launch", "checks", "verl_plugin"}),
    ],
)
def test_every_other_room_may_not_import_it(name, permitted):
    sources = set(contract(name)["source_modules"])
    # hpo_verl.__main__ imports the command alone.
    free = {f"hpo_verl.{room}" for room in permitted} | {"hpo_verl.__main__"}
    assert sources == rooms() - free


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for root in (PACKAGE, ROOT / "data_prep") for path in root.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
