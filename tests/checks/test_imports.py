"""What a configuration makes verl import is looked for, not imported, before anything starts."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import verl
from typer.testing import CliRunner
from verl.utils.tracking import Tracking

from hpo_verl.checks import imports
from hpo_verl.checks.configuration import check_names
from hpo_verl.cli import EXIT_BAD_INPUT, app

SOURCE = Path(verl.__file__).parent
BUILT_IN = {
    imports.ENGINE: {"naive"},
    imports.STRATEGY: {"fsdp", "fsdp2", "fsdp_turbo"},
    f"{imports.ROLLOUT}.name": {"hf", "vllm"},
    "trainer.logger": {"console", "file"},
}
GPU = {"recipe": "countdown3-1.5b", "hardware": "1gpu"}


@pytest.fixture
def absent(monkeypatch):
    """A function: only these modules of the table are not installed."""
    find = importlib.util.find_spec

    def hide(*names):
        spec = find("json")
        monkeypatch.setattr(imports, "find_spec", lambda name: None if name in names else spec)

    return hide


@pytest.mark.parametrize(
    ("key", "value", "module", "package"),
    [
        ("trainer.logger", ["console", "mlflow"], "mlflow", "mlflow"),
        ("trainer.logger", "swanlab", "swanlab", "swanlab"),
        (imports.ENGINE, "nccl", "cupy", "'verl[cupy-cu130]'"),
        (imports.ENGINE, "nixl", "nixl", "nixl"),
        (f"{imports.ROLLOUT}.name", "sglang", "sglang", "'verl[sglang]'"),
        (imports.STRATEGY, "veomni", "veomni", "'verl[veomni-sft]'"),
        (f"{imports.MODEL}.use_liger", True, "liger_kernel", "liger-kernel"),
        (f"{imports.ROLLOUT}.trace.backend", "weave", "weave", "weave"),
        ("actor_rollout_ref.actor.optim.optimizer_impl", "torchao.optim", "torchao", "torchao"),
    ],
)
def test_a_value_whose_module_is_missing(subject, absent, key, value, module, package):
    absent()
    assert imports.check_modules(subject({key: value})).status == "ok"
    absent(module)
    assert imports.check_modules(subject()).status == "ok"
    finding = imports.check_modules(subject({key: value}))
    last = value[-1] if isinstance(value, list) else value
    assert finding.status == "error"
    assert finding.detail == f"{key}={last} imports {module}, not installed"
    assert finding.fix == f"pip install {package}, or another value"


def test_nothing_is_imported(subject, monkeypatch, tmp_path):
    (tmp_path / "mlflow.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert imports.check_modules(subject({"trainer.logger": ["mlflow"]})).status == "ok"


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, [imports.ATTENTION, f"{imports.MODEL}.use_remove_padding"]),
        ({imports.ATTENTION: "sdpa"}, [f"{imports.MODEL}.use_remove_padding"]),
        ({f"{imports.MODEL}.use_remove_padding": False}, [imports.ATTENTION]),
        ({imports.ATTENTION: "sdpa", f"{imports.MODEL}.use_remove_padding": False}, []),
    ],
)
def test_flash_attention_on_a_gpu(subject, absent, changes, needs):
    absent("flash_attn")
    finding = imports.check_modules(subject(changes, **GPU))
    assert finding.status == ("error" if needs else "ok")
    assert finding.detail.count("imports flash_attn, not installed") == len(needs)
    assert all(key in finding.detail for key in needs)
    assert finding.fix == (
        "pip install --constraint constraints-gpu.txt '.[gpu]', or another value" if needs else ""
    )


def test_the_tiny_recipe_needs_no_flash_attention(subject, absent):
    absent("flash_attn")
    assert imports.check_modules(subject()).detail == "tensorboard"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.logger", ["console", "mlflo"]),
        (imports.ENGINE, "ncll"),
        (f"{imports.ROLLOUT}.name", "vlm"),
        (imports.STRATEGY, "fsdp3"),
        ("reward.reward_manager.name", "guardd"),
    ],
)
def test_a_name_that_verl_does_not_know(subject, key, value):
    finding = check_names(subject({key: value}))
    last = value[-1] if isinstance(value, list) else value
    assert finding.status == "error"
    assert finding.detail.startswith(f"{key}={last}: not registered with verl; ")


@pytest.mark.parametrize("key", BUILT_IN)
def test_what_verl_brings_itself_passes(subject, key):
    for value in BUILT_IN[key]:
        assert check_names(subject({key: value})).status == "ok", value


def test_the_table_holds_all_of_verls_loggers():
    here = BUILT_IN["trainer.logger"] | set(imports.MODULES["trainer.logger"])
    assert here == {*Tracking.supported_backend, "tracking"}


def test_the_table_holds_the_engines_that_verls_source_registers():
    files = [path.read_text() for path in (SOURCE / "checkpoint_engine").glob("*.py")]
    found = {
        line.split('"')[1]
        for text in files
        for line in text.splitlines()
        if line.startswith("@CheckpointEngineRegistry.register(")
    }
    assert found == BUILT_IN[imports.ENGINE] | set(imports.MODULES[imports.ENGINE])


@pytest.mark.parametrize("key", [imports.ENGINE, imports.STRATEGY])
def test_verls_source_imports_the_modules_of_the_table(key):
    folder = SOURCE / ("checkpoint_engine" if key == imports.ENGINE else "workers/engine")
    text = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    for needs in imports.MODULES[key].values():
        for module, _ in needs:
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
def test_the_driver_and_the_cuda_of_torch(subject, monkeypatch, cuda, driver, status):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(imports, "driver_version", lambda: driver)
    assert imports.check_driver(subject()) == []
    (finding,) = imports.check_driver(subject(recipe="countdown3-1.5b", hardware="1gpu"))
    assert finding.status == status
    if status == "error":
        assert finding.detail == "575.57.08, torch for CUDA 13.0 needs >= 580"


def test_the_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert imports.driver_version() is None
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && printf "580.95.05\\n580.95.05\\n"\n'
    )
    program.chmod(0o755)
    assert imports.driver_version() == "580.95.05"


def test_the_doctor_names_a_missing_logger(places, tmp_path):
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    given = ["countdown-tiny", *places, folder, "trainer.logger=[console,swanlab]", "--json"]
    result = CliRunner().invoke(app, ["doctor", *given])
    findings = {f["name"]: f for f in json.loads(result.stdout)["findings"]}
    assert result.exit_code == EXIT_BAD_INPUT
    assert findings["modules"]["detail"] == "trainer.logger=swanlab imports swanlab, not installed"
