"""Names and signatures of verl that the plugin relies on, read from its source.

Nothing of verl is imported, so another version fails here in a second, with the
name of what changed, and even where its imports do not work.
"""

import ast
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import hpo_verl

PACKAGE = Path(hpo_verl.__file__).parent
PERMITTED = ("0.9.1",)

# module:function or module:Class.method -> parameters in order; `=` marks a default.
SIGNATURES = {
    "verl.trainer.ppo.v1.trainer_base:register_trainer": "name",
    "verl.trainer.ppo.v1.trainer_base:get_trainer_cls": "name",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.__init__": "self config",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._setup": "self",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._build_replay_buffer": "self",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._init_dataloader": "self",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._submit_batch_to_rollout": "self batch",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.prepare_step": "self",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._balance_batch": (
        "self batch metrics logging_prefix= keep_minibatch="
    ),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._get_required_batch_multiple": "self dp_size",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_old_log_prob": "self batch metrics",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_advantage": "self batch metrics",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._update_actor": "self batch metrics",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._maybe_log_val_generations": (
        "self inputs outputs scores"
    ),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._val_metrics_update": (
        "self data_sources sample_uids reward_extra_infos_dict sample_turns expected_acc_counts="
    ),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._load_checkpoint": "self",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._save_checkpoint": "self",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.fit": "self agent_loop_manager",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.on_train_begin": "self",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.on_step_begin": "self",
    "verl.utils.tracking:FileLogger.finish": "self",
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._agent_loop_postprocess": (
        "self output validate **kwargs"
    ),
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ.__init__": "self *args **kwargs",
    "verl.experimental.agent_loop.agent_loop:AgentLoopWorker._run_agent_loop": (
        "self sampling_params trajectory * agent_name trace= **kwargs"
    ),
    "verl.experimental.agent_loop.agent_loop:AgentLoopWorker._compute_score": (
        "self outputs kwargs"
    ),
    "verl.experimental.agent_loop.agent_loop:AgentLoopBase.ct_build_initial_tokens": (
        "self messages tools= images= videos= audios= mm_inputs_out="
    ),
    "verl.experimental.agent_loop.agent_loop:register": "agent_name",
    "verl.experimental.agent_loop.single_turn_agent_loop:SingleTurnAgentLoop.run": (
        "self sampling_params priority= **kwargs"
    ),
    "verl.experimental.agent_loop.agent_loop:AgentLoopBase._cap_text_prompt_length": (
        "self prompt_ids"
    ),
    "verl.experimental.agent_loop.tool_agent_loop:ToolAgentLoop.__init__": (
        "self *args tools= **kwargs"
    ),
    "verl.experimental.agent_loop.tool_agent_loop:ToolAgentLoop.run": (
        "self sampling_params priority= **kwargs"
    ),
    "verl.experimental.agent_loop.tool_agent_loop:ToolAgentLoop._make_request_id": (
        "priority full_determinism"
    ),
    "verl.experimental.agent_loop.tool_agent_loop:ToolAgentLoop._handle_pending_state": (
        "self agent_data sampling_params"
    ),
    "verl.experimental.agent_loop.tool_agent_loop:ToolAgentLoop._handle_generating_state": (
        "self agent_data sampling_params ignore_termination="
    ),
    "verl.experimental.agent_loop.tool_agent_loop:ToolAgentLoop._handle_processing_tools_state": (
        "self agent_data"
    ),
    "verl.experimental.agent_loop.tool_agent_loop:AgentData.__init__": (
        "self messages image_data video_data audio_data mm_processor_kwargs metrics request_id "
        "tools_kwargs"
    ),
    "verl.experimental.agent_loop.tool_parser:ToolParser.register": "cls name",
    "verl.experimental.agent_loop.tool_parser:ToolParser.extract_tool_calls": (
        "self responses_ids tools="
    ),
    "verl.tools.function_tool:function_tool": "name= * schema=",
    "verl.tools.function_tool:get_function_tool": "name",
    "verl.experimental.reward_loop.reward_manager.registry:register": "name",
    "verl.experimental.reward_loop.reward_manager.naive:NaiveRewardManager.__init__": (
        "self config tokenizer compute_score reward_router_address= reward_model_tokenizer="
    ),
    "verl.experimental.reward_loop.reward_manager.naive:NaiveRewardManager.run_single": (
        "self data"
    ),
    "verl.experimental.reward_loop.reward_loop:RewardLoopWorker.compute_score_batch": ("self data"),
    "verl.experimental.reward_loop.reward_loop:RewardLoopWorker.compute_score": "self data",
    "verl.trainer.ppo.reward:load_reward_manager": "config tokenizer **reward_kwargs",
    "verl.trainer.ppo.reward:get_custom_reward_fn": "config",
    "verl.trainer.ppo.core_algos:register_policy_loss": "name",
    "verl.trainer.ppo.core_algos:register_adv_est": "name_or_enum",
    "verl.trainer.ppo.core_algos:get_policy_loss_fn": "name",
    "verl.trainer.ppo.core_algos:get_adv_estimator_fn": "name_or_enum",
    "verl.trainer.ppo.core_algos:agg_loss": (
        "loss_mat loss_mask loss_agg_mode "
        "dp_size= batch_num_tokens= global_batch_size= loss_scale_factor="
    ),
    "verl.trainer.ppo.core_algos:compute_policy_loss_vanilla": (
        "old_log_prob log_prob advantages response_mask loss_agg_mode= config= rollout_is_weights="
    ),
    "verl.workers.utils.losses:ppo_loss": "config model_output data dp_group=",
    "verl.workers.engine_workers:ActorRolloutRefWorker.set_loss_fn": "self loss_fn",
    "verl.workers.engine.base:EngineRegistry.register": "cls model_type backend device= vendor=",
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngine.forward_backward_batch": (
        "self data loss_function forward_only="
    ),
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.prepare_model_outputs": (
        "self output output_args micro_batch logits_processor_func"
    ),
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngine._merged_lora_per_tensor_param": "self",
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngine.optimizer_step": "self",
    "verl.utils.fsdp_utils:merged_lora_context": "actor backup_adapters=",
    "verl.utils.fsdp_utils:normalize_peft_param_name": "params",
    "verl.utils.model:convert_weight_keys": "state_dict model",
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngine.optimizer_zero_grad": "self",
    "verl.workers.engine.base:BaseEngine.train_batch": "self data loss_function",
    "verl.utils.tensordict_utils:get_tensordict": "tensor_dict non_tensor_dict=",
    "verl.workers.rollout.replica:RolloutReplicaRegistry.register": "cls name loader",
    "verl.workers.rollout.replica:RolloutReplica.__init__": (
        "self replica_rank config model_config "
        "gpus_per_node= is_reward_model= is_teacher_model= name_suffix="
    ),
    "verl.workers.rollout.base:BaseRollout.__init__": (
        "self config model_config device_mesh *args **kwargs"
    ),
    "verl.workers.rollout.llm_server:LLMServerClient.__init__": (
        "self config load_balancer_handle= **kwargs"
    ),
    "verl.workers.rollout.llm_server:LLMServerClient.generate": (
        "self request_id * prompt_ids sampling_params "
        "image_data= video_data= audio_data= mm_processor_kwargs= **kwargs"
    ),
    "verl.workers.rollout.llm_server:LLMServerClient._acquire_server": "self request_id **extra",
    "verl.workers.rollout.llm_server:LLMServerClient._release_server": (
        "self server_id request_id="
    ),
    "verl.workers.rollout.base:get_rollout_class": "rollout_name mode=",
    "verl.workers.rollout.vllm_rollout.vllm_rollout:ServerAdapter._execute_method": (
        "self method non_block= timeout= args= kwargs="
    ),
    "verl.workers.rollout.vllm_rollout.vllm_rollout:ServerAdapter.update_weights": (
        "self weights global_steps= wire_format= **kwargs"
    ),
    "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:"
    "BucketedWeightSender._init_socket": "self",
    "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer._post_init": (
        "self cuda_visible_devices"
    ),
    "verl.workers.utils.padding:no_padding_2_padding": "tensor data",
    "verl.workers.utils.padding:response_to_nested": "tensor response_mask",
    "verl.workers.utils.padding:response_from_nested": "tensor response_mask",
    "verl.utils.transferqueue_utils:kv_batch_meta2batch_meta": "meta",
    "verl.utils.tensordict_utils:list_of_dict_to_tensordict": "list_of_dicts",
    "verl.utils.tensordict_utils:assign_non_tensor_stack": "tensor_dict key val",
    "verl.utils.seqlen_balancing:calculate_workload": "seqlen_list",
    "verl.utils.seqlen_balancing:get_seqlen_balanced_partitions": (
        "seqlen_list k_partitions equal_size"
    ),
    "verl.utils.seqlen_balancing:log_seqlen_unbalance": "seqlen_list partitions prefix",
    "verl.utils.config:omega_conf_to_dataclass": "config dataclass_type=",
    "verl.utils.config:validate_config": "config use_reference_policy use_critic",
    "verl.trainer.ppo.utils:need_critic": "config",
    "verl.trainer.ppo.utils:need_reference_policy": "config",
    "verl.utils.distributed:initialize_global_process_group_ray": "timeout_second= backend=",
    "verl.utils.torch_functional:logprobs_from_logits_naive": "logits labels",
    "verl.utils.torch_functional:logprobs_from_logits_v2": "logits labels",
    "verl.plugin.platform.platform_manager:PlatformRegistry.register": "cls platform",
}


def source(module):
    """Path of a module's source; None where there is no such module."""
    root = find_spec("verl").submodule_search_locations[0]
    path = Path(root).joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@lru_cache
def tree(module):
    path = source(module)
    assert path is not None, f"verl has no module {module}"
    return ast.parse(path.read_text())


def statements(body):
    """Statements of a body, those under `if`, `try` and `with` too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from statements(getattr(node, part, []))


def origin(module, node):
    """The module that a `from` statement, relative or not, of a module names."""
    if not node.level:
        return node.module
    package = module if source(module).name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}"


@lru_cache
def defined(module):
    """Name -> node of what a module defines or imports."""
    names = {}
    for node in statements(tree(module).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name): node for alias in node.names}
            if "*" in names:
                del names["*"]
                names |= defined(origin(module, node))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return names


def parameters(function):
    """Names of a function's parameters in order, with `=`, `*` and `**` as in its source."""
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    optional = len(plain) - len(arguments.defaults)
    shown = [one.arg + ("=" if at >= optional else "") for at, one in enumerate(plain)]
    if arguments.vararg:
        shown.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        shown.append("*")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    shown += [one.arg + ("=" if default is not None else "") for one, default in pairs]
    if arguments.kwarg:
        shown.append(f"**{arguments.kwarg.arg}")
    return " ".join(shown)


def imported():
    """Module and name of everything that this package imports from verl."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "verl":
                found |= {(node.module, alias.name) for alias in node.names}
    return sorted(found)


def test_the_version_is_one_that_was_checked():
    assert version("verl") in PERMITTED


@pytest.mark.parametrize(("module", "name"), imported())
def test_what_is_imported_from_verl_is_there(module, name):
    there = name in defined(module) or source(f"{module}.{name}") is not None
    assert there, f"verl has no {name} in {module}"


@pytest.mark.parametrize("where", SIGNATURES)
def test_what_is_called_or_overridden_has_its_signature(where):
    module, _, path = where.partition(":")
    *classes, name = path.split(".")
    body = tree(module).body
    for one in classes:
        (found,) = [n for n in statements(body) if isinstance(n, ast.ClassDef) and n.name == one]
        body = found.body
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [n for n in statements(body) if isinstance(n, kinds) and n.name == name]
    assert functions, f"verl has no {where}"
    # The last definition is the one that counts.
    assert parameters(functions[-1]) == SIGNATURES[where], f"verl changed {where}"


def test_both_sides_name_the_socket_of_weights_after_the_job():
    folder = "verl.workers.rollout.vllm_rollout"
    for side in ("vllm_rollout", "utils"):
        text = source(f"{folder}.{side}").read_text()
        assert 'f"ipc:///tmp/rl-colocate-zmq-{job_id}-replica-' in text, side
    server = source(f"{folder}.vllm_async_server").read_text()
    assert 'os.environ["VERL_RAY_JOB_ID"] = ray.get_runtime_context().get_job_id()' in server


def test_a_missing_module_or_name_is_told():
    assert source("verl.no.such_module") is None
    with pytest.raises(AssertionError, match=r"verl has no module verl\.gone"):
        defined("verl.gone")
    assert "no_such_name" not in defined("verl.trainer.ppo.core_algos")


def test_parameters_are_shown_as_they_are_written():
    text = "def f(a, /, b, c=1, *args, d, e=2, **kwargs): pass"
    assert parameters(ast.parse(text).body[0]) == "a b c= *args d e= **kwargs"
    assert parameters(ast.parse("def f(*, d): pass").body[0]) == "* d"
