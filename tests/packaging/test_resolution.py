"""Every extra and both sets of pins resolve: uv reads metadata from the package index only."""

import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = list(PROJECT["optional-dependencies"])
PYTHONS = [text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"] if "Python :: 3." in text]
# glibc 2.28: the oldest that torch's wheels run on. Ubuntu 24.04 of the image has 2.39.
OLDEST, IMAGE = "x86_64-manylinux_2_28", "x86_64-manylinux_2_39"
# What PyPI's torch for CUDA needs and a torch for the CPU does not.
CUDA_ONLY = re.compile(r"(nvidia-|cuda-|triton$)")
# trl, which this extra is for, does without Python 3.10.
NOTHING_IN = {("bench", "3.10")}


def resolve(python, *arguments, platform=OLDEST):
    """Name -> version or address of what uv would install for a Python on Linux."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "pyproject.toml"]
    target = ["--python-version", python, "--python-platform", platform]
    # This interpreter, so that uv does not search the machine for one of that version.
    options = ["--python", sys.executable, "--no-annotate", "--no-header"]
    done = subprocess.run(
        [*command, *target, *options, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return pins(done.stdout)


def pins(text):
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    parts = [re.split(r"\s*(==|@)\s*", line.split(" ; ")[0], maxsplit=1) for line in lines]
    return {re.sub(r"[-_.]+", "-", name).lower(): value for name, _, value in parts}


@pytest.fixture(scope="module")
def torch_for_the_cpu(tmp_path_factory):
    """A stand-in for the one wheel that PyTorch's own index has and the package index has not."""
    folder = tmp_path_factory.mktemp("wheels")
    needs = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools"]
    head = "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n"
    with zipfile.ZipFile(folder / "torch-2.13.0+cpu-py3-none-any.whl", "w") as wheel:
        information = "torch-2.13.0+cpu.dist-info"
        wheel.writestr(
            f"{information}/METADATA", head + "".join(f"Requires-Dist: {name}\n" for name in needs)
        )
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    return folder


@pytest.fixture(scope="module")
def resolved(torch_for_the_cpu):
    """Extra and Python -> the resolution, several at a time since each waits for the index."""
    options = {None: [], **{extra: ["--extra", extra] for extra in EXTRAS}}
    options["cpu-vllm"] += ["--find-links", torch_for_the_cpu]
    with ThreadPoolExecutor(4) as pool:
        return {
            (extra, python): pool.submit(resolve, python, *arguments)
            for extra, arguments in options.items()
            for python in PYTHONS
        }


@pytest.mark.parametrize("python", PYTHONS)
def test_the_package_resolves(python, resolved):
    found = resolved[None, python].result()
    assert found["verl"].startswith("0.9.")
    assert "vllm" not in found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_resolves(extra, python, resolved):
    found = resolved[extra, python].result()
    if (extra, python) in NOTHING_IN:
        return
    for requirement in PROJECT["optional-dependencies"][extra]:
        name = re.match(r"[\w-]+", requirement)[0]
        # An extra within an extra is this package itself.
        assert name in found or name == PROJECT["name"]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_gpu_extra_can_train(python, resolved):
    found = resolved["gpu", python].result()
    # verl's defaults attend and compute log-probabilities with flash-attn; `nccl` needs cupy.
    assert {"vllm", "flash-attn", "cupy-cuda13x"} <= set(found)
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= set(found)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_constraints_of_the_cpu_hold_everything(python):
    arguments = ["--extra", "cpu", "--extra", "dev", "--constraint", "constraints-cpu.txt"]
    found = resolve(python, *arguments)
    held = pins((ROOT / "constraints-cpu.txt").read_text())
    assert [name for name in found if name not in held and not CUDA_ONLY.match(name)] == []


def test_the_image_is_what_its_pins_say():
    held = pins((ROOT / "constraints-gpu.txt").read_text())
    arguments = ["--extra", "gpu", "--constraint", "constraints-gpu.txt"]
    assert resolve("3.12", *arguments, platform=IMAGE) == held
