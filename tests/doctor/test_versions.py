"""Versions are compared with the tested set, and the set is the repository's and verl's own."""

import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from hpo_verl.doctor import versions

ROOT = Path(__file__).resolve().parents[2]
HERE = {
    "verl": "0.9.1",
    "torch": "2.13.0+cpu",
    "ray": "2.60.0",
    "transformers": "5.10.4",
    **dict.fromkeys(versions.COMPANIONS, "1.0"),
}


@pytest.fixture
def installed(monkeypatch):
    def fake(**changes):
        found = {**HERE, **changes}
        monkeypatch.setattr(versions, "installed", lambda name: found.get(name))

    return fake


def only(findings, name):
    (finding,) = [f for f in findings if f.name == name]
    return finding


def test_the_tested_set_is_that_of_the_constraints_and_of_verls_extra():
    pins = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, version in versions.TESTED["cpu"].items()} <= set(pins)
    extra = {text.split(";")[0].strip() for text in requires("verl") if 'extra == "vllm"' in text}
    assert {f"{name}=={version}" for name, version in versions.TESTED["cuda"].items()} <= extra


def test_the_tested_set_passes_and_a_build_is_not_a_version(installed):
    installed()
    findings = [*versions.check_base(), *versions.check_packages("cpu", vllm_needed=False)]
    assert {f.status for f in findings} == {"ok", "skipped"}
    assert only(findings, "vllm").status == "skipped"
    assert only(findings, "torch").detail == "2.13.0+cpu"


@pytest.mark.parametrize("found", ["0.8.0", "0.10.0", None])
def test_another_verl(installed, found):
    installed(verl=found)
    finding = only(versions.check_base(), "verl")
    assert finding.status == "error"
    assert finding.detail == f"{found or 'not installed'}; need >=0.9.1,<0.10"
    assert finding.fix == "pip install 'verl==0.9.1'"


def test_another_python(monkeypatch):
    monkeypatch.setattr(versions, "PYTHON_VERSIONS", ((3, 13), (3, 14)))
    finding = only(versions.check_base(), "python")
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (finding.status, finding.detail) == ("error", f"{running}; need >= 3.13 and < 3.14")


def test_an_untested_torch_is_a_warning_that_names_the_tested_one(installed):
    installed(torch="2.12.1+cu130")
    finding = only(versions.check_packages("cuda", vllm_needed=False), "torch")
    assert finding.status == "warning"
    assert "2.12.1+cu130; the set known for cuda has 2.11.0" in finding.detail


@pytest.mark.parametrize(("found", "status"), [("2.53.9", "error"), ("2.54.0", "warning")])
def test_a_ray_that_a_web_page_can_drive(installed, found, status):
    installed(ray=found)
    finding = only(versions.check_packages("cpu", vllm_needed=False), "ray")
    assert finding.status == status
    assert ("CVE-2026-27482" in finding.detail) == (status == "error")


def test_vllm_is_missed_only_where_it_is_needed(installed):
    installed()
    finding = only(versions.check_packages("cuda", vllm_needed=True), "vllm")
    assert (finding.status, finding.fix) == ("error", "pip install 'hpo-verl[gpu]'")


def test_a_package_that_verls_plain_installation_lacks(installed):
    installed(msgspec=None)
    finding = only(versions.check_packages("cpu", vllm_needed=False), "trainer packages")
    assert (finding.status, finding.fix) == ("error", "pip install msgspec")
