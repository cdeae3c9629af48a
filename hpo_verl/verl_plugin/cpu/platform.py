"""The platform "cpu" for verl's `PlatformRegistry`."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def machine_has_accelerator() -> bool:
    """Whether this installation can drive an accelerator, or this machine shows one.

    A torch build with CUDA or ROCm counts even where no device is visible: the
    driver of a GPU cluster often runs on a node without one, and must still ask
    for "cuda".
    """
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


class CpuDeviceModule(ModuleType):
    """`torch.cpu`, with the memory and random-number functions that `torch.cuda` has.

    Memory figures are those of the process (resident set, bytes).
    """

    memory = SimpleNamespace(_set_allocator_settings=lambda settings: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def empty_cache() -> None:
        return None

    ipc_collect = empty_cache

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        return psutil.Process().memory_info().rss

    memory_reserved = memory_allocated

    @staticmethod
    def max_memory_allocated(device: Any = None) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    max_memory_reserved = max_memory_allocated

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        return None

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "cpu"

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    manual_seed_all = manual_seed

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


class PlatformCpu(PlatformBase):
    """One CPU "device" per process; Ray's resource "GPU" is a nominal slot."""

    _device_module = CpuDeviceModule("hpo_verl_cpu_device")

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

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        self._device_module.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        # verl counts Ray's "GPU" on each node before it places workers; the
        # recipe tells Ray to offer as many nominal ones as there are ranks.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


def register() -> None:
    """Offer the platform to verl, and give it verl's FSDP engine.

    verl registers that engine for "cuda" and "npu"; it runs on the CPU as it
    is, and `VERL_ENGINE_DEVICE` is verl's own switch to select it.
    """
    PlatformRegistry.register(platform="cpu")(PlatformCpu)
    if cpu_is_selected():
        os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
