"""What can be known of the images without a Docker engine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docker"))
from dockerfile_steps import install_steps, instructions  # noqa: E402

FILES = [ROOT / "docker" / name for name in ("Dockerfile", "Dockerfile.cpu")]
PERMITTED = [
    line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
]
both = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def stages(path):
    """The instructions of each build stage, and those before the first."""
    split = [[]]
    for instruction in instructions(path):
        if instruction[0] == "FROM":
            split.append([])
        split[-1].append(instruction)
    return split


def values(stage, keyword):
    return [arguments for word, arguments in stage if word == keyword]


@both
def test_base_images_are_build_arguments_with_an_exact_tag(path):
    head, *rest = stages(path)
    defaults = dict(text.split("=", 1) for text in values(head, "ARG"))
    for stage in rest:
        (source,) = values(stage, "FROM")
        name = re.match(r"\$\{(\w+)\}", source).group(1)
        image, _, tag = defaults[name].rpartition(":")
        assert image in ("nvidia/cuda", "python")
        assert re.search(r"\d", tag)
        assert "latest" not in tag


@both
def test_the_image_runs_as_a_user_without_rights(path):
    final = stages(path)[-1]
    assert values(final, "USER") == ["10001:10001"]
    words = [word for word, _ in final]
    assert "RUN" not in words[words.index("USER") :]
    assert any("useradd --uid 10001" in text for text in values(final, "RUN"))


@both
def test_the_plugin_comes_from_a_wheel_of_the_first_stage(path):
    _, first, final = stages(path)
    assert values(first, "FROM")[0].endswith("AS wheel")
    assert any("pip wheel --no-cache-dir --no-deps" in text for text in values(first, "RUN"))
    assert "--from=wheel /wheels /wheels" in values(final, "COPY")
    assert any("/wheels/*.whl" in text for text in values(final, "RUN"))
    copied = " ".join(values(first, "COPY")).split()
    assert {"hpo_verl", "data_prep", "recipes"} <= set(copied)


@both
def test_what_is_copied_exists_and_is_let_in(path):
    for stage in stages(path):
        for text in values(stage, "COPY"):
            if text.startswith("--from"):
                continue
            for source in text.split()[:-1]:
                assert (ROOT / source).exists()
                assert source in PERMITTED


def test_only_named_things_enter_the_build():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if line and not line.startswith("#")) == "*"
    assert set(PERMITTED).isdisjoint({".git", ".venv", "runs", "outputs", "tests", "docker"})
    assert "**/__pycache__" in lines


@both
def test_no_secret_and_no_download_by_address(path):
    text = path.read_text()
    names = re.findall(r"^(?:ARG|ENV|\s+)\s*(\w+)=", text, re.MULTILINE)
    assert names
    assert not [n for n in names if re.search(r"TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", n)]
    assert not re.search(r"\b(curl|wget|sudo|chmod 777)\b|--trusted-host|hf_\w{8}", text)
    assert "ADD" not in {word for word, _ in instructions(path)}


@both
def test_entry_point_health_check_and_labels(path):
    from typer.main import get_command

    from hpo_verl.cli import app
    from hpo_verl.config.recipes import recipe_names

    final = stages(path)[-1]
    commands = get_command(app).commands
    (entry,) = values(final, "ENTRYPOINT")
    assert json.loads(entry) == ["hpo-verl"]
    (health,) = values(final, "HEALTHCHECK")
    # Right in a container that has no recipe's data yet.
    assert json.loads(health[health.index("[") :]) == ["hpo-verl", "doctor", "--quick"]
    options = {name for parameter in commands["doctor"].params for name in parameter.opts}
    assert "--quick" in options
    seconds = int(re.search(r"--timeout=(\d+)s", health).group(1))
    assert seconds >= 60
    (default,) = values(final, "CMD")
    default_command, *rest = json.loads(default)
    assert default_command in commands
    assert set(rest) <= set(recipe_names())
    labels = " ".join(values(final, "LABEL"))
    for label in ("title", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert "hpo_verl.sbom=" in labels


def test_the_cpu_image_pins_what_it_installs():
    steps = install_steps(FILES[1])
    assert len(steps) == 3
    assert all("--constraint constraints-cpu.txt" in step for step in steps if "install" in step)
    pins = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    assert any(step.endswith(torch) for step in steps)


def test_the_gpu_image_installs_the_extra_with_its_pins_and_checks_them():
    (step,) = [s for s in install_steps(FILES[0]) if "pip install" in s]
    install, check = step.index("pip install"), step.index("-m pip check")
    assert install < step.index("--constraint constraints-gpu.txt") < check
    assert install < step.index('"$(echo /wheels/*.whl)[gpu]"') < check


def test_base_python_torch_and_flash_attn_of_the_gpu_image_belong_together():
    pins = (ROOT / "constraints-gpu.txt").read_text()
    address = re.search(r"^flash-attn @ (https://\S+\.whl)$", pins, re.MULTILINE).group(1)
    python, abi, platform = address.removesuffix(".whl").rsplit("-", 3)[1:]
    assert (python, abi, platform) == ("cp312", "cp312", "linux_x86_64")
    head, _, final = stages(FILES[0])
    (step,) = [s for s in install_steps(FILES[0]) if "pip install" in s]
    assert step.startswith("python3.12 -m venv")
    assert any("python3.12 python3.12-dev python3.12-venv" in s for s in values(final, "RUN"))
    # Triton and FlashInfer compile at run time: a base with nvcc, of torch's own CUDA.
    (base,) = [text for text in values(head, "ARG") if text.startswith("CUDA_IMAGE=")]
    cuda = re.search(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu24\.04$", base).group(1)
    runtime = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", pins, re.MULTILINE).group(1)
    assert cuda == runtime
    assert re.search(r"^torch==2\.11\.0$", pins, re.MULTILINE)


def test_continuation_lines_and_comments_are_read_as_docker_reads_them(tmp_path):
    path = tmp_path / "Dockerfile"
    path.write_text("# note\nrun a \\\n  # between\n && b\n\nUSER 1\n")
    assert instructions(path) == [("RUN", "a && b"), ("USER", "1")]


def test_the_install_script_is_valid_and_covers_every_permitted_path():
    script = ROOT / "docker" / "check_install.sh"
    subprocess.run(["bash", "-n", script], check=True)
    (line,) = [text for text in script.read_text().splitlines() if text.startswith("for name in")]
    assert set(line.removesuffix("; do").split()[3:]) == set(PERMITTED)
