"""Version, changelog, citation and templates belong together."""

import os
from pathlib import Path

import pytest
import yaml

from hpo_verl import __version__

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def test_the_citation_has_the_version_of_the_package():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_the_changelog_tells_the_version_first():
    text = (ROOT / "CHANGELOG.md").read_text()
    first = text.index("\n## ")
    if ".dev" in __version__:
        assert text[first:].startswith(f"\n## [Unreleased]\n\nVersion `{__version__}`.")
    else:
        assert text[first:].startswith(f"\n## [{__version__}] - ")


def test_the_source_distribution_holds_what_the_repository_does():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    listed = set(settings["targets"]["sdist"]["include"])
    assert {"CHANGELOG.md", "CITATION.cff", "docs", "hpo_verl", "recipes", "tests"} <= listed
    assert [name for name in listed if not (ROOT / name).exists()] == []


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert commands == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.md")), ids=str)
def test_issue_templates_have_a_name(path):
    _, head, body = path.read_text().split("---\n", 2)
    assert yaml.safe_load(head).keys() >= {"name", "about"}
    assert body.strip()
