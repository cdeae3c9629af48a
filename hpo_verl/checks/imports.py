"""Whether what a configuration's values make verl import is installed.

verl imports a logger, an engine or a kernel only where the configuration names it, which is
after the model and vLLM are up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from omegaconf import ListConfig

from hpo_verl.checks.finding import Finding, error, ok, skipped
from hpo_verl.checks.machine import driver_version
from hpo_verl.checks.subject import Subject
from hpo_verl.errors import EnvironmentCheckError

MODEL = "actor_rollout_ref.model"
ROLLOUT = "actor_rollout_ref.rollout"
STRATEGY = "actor_rollout_ref.actor.strategy"
ENGINE = f"{ROLLOUT}.checkpoint_engine.backend"
ATTENTION = f"{MODEL}.override_config.attn_implementation"
FLASH_ATTENTION = ("flash_attn", "--constraint constraints-gpu.txt '.[gpu]'")
CUPY = ("cupy", "'verl[cupy-cu130]'")
MOONCAKE = ("mooncake", "mooncake-transfer-engine")
# Key -> value -> modules that verl 0.9.1 imports for it, each with what pip installs.
# vLLM and what every run imports are compared with a tested version elsewhere.
MODULES: dict[str, dict[Any, list[tuple[str, str]]]] = {
    "trainer.logger": {
        **{name: [(name, name)] for name in ("wandb", "mlflow", "swanlab", "clearml", "trackio")},
        "tensorboard": [("tensorboard", "tensorboard")],
        "tracking": [("wandb", "wandb")],
        "vemlp_wandb": [("volcengine_ml_platform", "volcengine-ml-platform")],
        "rl_insight": [("rl_insight", "rl-insight")],
    },
    f"{ROLLOUT}.trace.backend": {name: [(name, name)] for name in ("weave", "mlflow", "trackio")},
    f"{ROLLOUT}.name": {
        "sglang": [("sglang", "'verl[sglang]'")],
        "trtllm": [("tensorrt_llm", "tensorrt-llm")],
    },
    ENGINE: {
        "nccl": [CUPY],
        "delta_sharded": [CUPY],
        "nixl": [("nixl", "nixl"), CUPY],
        "mooncake": [MOONCAKE],
        "kimi_ckpt_engine": [("checkpoint_engine", "checkpoint-engine")],
    },
    STRATEGY: {
        "megatron": [("megatron", "'verl[megatron]'")],
        "veomni": [("veomni", "'verl[veomni-sft]'")],
        "torchtitan": [("torchtitan", "torchtitan")],
        "automodel": [("nemo_automodel", "nemo-automodel")],
    },
    f"{MODEL}.use_liger": {True: [("liger_kernel", "liger-kernel")]},
    f"{MODEL}.fused_kernel_options.impl_backend": {"triton": [("triton", "triton")]},
    ATTENTION: {
        "flash_attention_2": [FLASH_ATTENTION],
        "flash_attention_3": [("flash_attn_interface", "flash-attn-3")],
    },
    "transfer_queue.backend.storage_backend": {"MooncakeStore": [MOONCAKE]},
    "global_profiler.tool": {"nsys": [("nvtx", "nvtx")]},
    "actor_rollout_ref.actor.optim.optimizer_impl": {
        "torchao.optim": [("torchao", "torchao")],
        "bitsandbytes.optim": [("bitsandbytes", "bitsandbytes")],
    },
}
# verl's own default, which its configuration does not show.
DEFAULTS = {ATTENTION: "flash_attention_2"}
# CUDA's major version -> the lowest driver that runs its builds on every card.
LOWEST_DRIVER = {"13": 580}


def check_modules(subject: Subject) -> Finding:
    """Whether the modules are installed that verl will import for the configuration's values."""
    needed = dict.fromkeys(_needed(subject))
    absent = [need for need in needed if not _is_installed(need[1])]
    if absent:
        return error(
            "modules",
            "; ".join(
                f"{setting} imports {module}, not installed" for setting, module, _ in absent
            ),
            f"pip install {' '.join(dict.fromkeys(package for *_, package in absent))}, "
            "or another value",
        )
    modules = sorted({module for _, module, _ in needed})
    return ok("modules", ", ".join(modules) or "no value needs one more")


def _needed(subject: Subject) -> Iterator[tuple[str, str, str]]:
    """`key=value`, module and what pip installs, for each module that a value needs."""
    for key, values in MODULES.items():
        for value in _values(subject, key):
            for module, package in values.get(value, ()):
                yield f"{key}={value}", module, package
    # Without it verl takes the logarithms of the probabilities token by token.
    if subject.get("trainer.device") == "cuda" and subject.get(f"{MODEL}.use_remove_padding"):
        yield f"{MODEL}.use_remove_padding=true", *FLASH_ATTENTION


def _values(subject: Subject, key: str) -> list[Any]:
    value = subject.get(key, DEFAULTS.get(key))
    if isinstance(value, ListConfig):
        return list(value)
    return [] if value is None else [value]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:
        # Somebody put a module without a spec in its place.
        return True


def check_driver(subject: Subject) -> list[Finding]:
    """Whether NVIDIA's driver is new enough for the CUDA that torch was built for."""
    return [] if subject.on_cpu else [_driver()]


def _driver() -> Finding:
    import torch

    cuda = torch.version.cuda
    try:
        found = driver_version()
    except EnvironmentCheckError as problem:
        return error("driver", str(problem), "repair the driver, or ask the machine's owner")
    if cuda is None or found is None:
        missing = "torch was built without CUDA" if cuda is None else "no NVIDIA driver here"
        return skipped("driver", missing)
    lowest, number = LOWEST_DRIVER.get(cuda.split(".")[0]), re.match(r"\d+", found)
    shown = f"{found}, torch for CUDA {cuda}"
    if lowest and number and int(number[0]) < lowest:
        return error(
            "driver",
            f"{shown} needs >= {lowest}",
            f"driver {lowest} or newer, or a torch for an older CUDA",
        )
    return ok("driver", shown)
