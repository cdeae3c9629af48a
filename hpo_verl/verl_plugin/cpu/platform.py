"""The platform "cpu" for verl's `PlatformRegistry`."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def machine_has_accelerator() -> bool:
    """Whether this installation can drive an accelerator, or this machine shows one."""
    # Even where no device is visible: the driver of a GPU cluster often runs on a node without
    # one, and must still ask for "cuda".
    if torch.version.cuda is not None or torch.version.hip is not None:
        return True
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type not in ("cpu", "mps"):
        return True
    return PlatformBase.check_smi_command("nvidia-smi")


def cpu_is_selected() -> bool:
    """Whether verl runs on the CPU in this process: asked for, or nothing else is there."""
    requested = os.environ.get("VERL_PLATFORM", "").strip().lower()
    return requested == "cpu" if requested else not machine_has_accelerator()


def _memory() -> int:
    return psutil.Process().memory_info().rss


def _peak_memory() -> int:
    # Linux counts it in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free_and_total_memory() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def device_module() -> ModuleType:
    """`torch.cpu`, with what verl also asks of `torch.cuda`; memory is the process's, in bytes."""
    module = ModuleType("hpo_verl_cpu_device")
    vars(module).update(
        vars(torch.cpu),
        empty_cache=lambda: None,
        get_device_name=lambda: "cpu",
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        memory_allocated=_memory,
        memory_reserved=_memory,
        max_memory_allocated=_peak_memory,
        max_memory_reserved=_peak_memory,
        mem_get_info=_free_and_total_memory,
    )
    return module


class PlatformCpu(PlatformBase):
    """One CPU "device" per process; Ray's resource "GPU" is a nominal slot."""

    _device_module = device_module()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return cpu_is_selected()

    def current_device(self) -> Any:
        # verl hands this to `Tensor.to`, where an index would mean an accelerator.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        # verl counts Ray's "GPU" on each node before it places workers; the
        # recipe tells Ray to offer as many nominal ones as there are ranks.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        yield

    def nothing_to_do(self, *args: Any, **kwargs: Any) -> None:
        """What concerns an accelerator only."""

    set_device = synchronize = set_allocator_settings = empty_cache = nothing_to_do
    profiler_start = profiler_stop = cudart = nothing_to_do


def register() -> None:
    """Offer the platform to verl, and give it verl's FSDP engine.

    verl registers that engine for "cuda" and "npu"; it runs on the CPU as it
    is, and `VERL_ENGINE_DEVICE` is verl's own switch to select it.
    """
    PlatformRegistry.register(platform="cpu")(PlatformCpu)
    if cpu_is_selected():
        os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
