"""Whether a LoRA adapter is one that is trained, reaches the rollout, and can be exported.

Read in verl 0.9.1: its FSDP engine adapts where `lora_rank` is above 0 and reads no other rank.
With `lora.merge` the rollout gets the sum of weights and adapter. Without it, it gets the adapter
alone, which only vLLM takes, and the frozen weights once, before it, if `load_format` is dummy.
"""

from __future__ import annotations

from hpo_verl.checks.finding import Finding, error, ok
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.settings import ACTOR, MODEL, ROLLOUT

# The largest rank for which vLLM has room.
VLLM_MAX_RANK = 512
MERGE = f"{MODEL}.lora.merge"


def check_adapter(run: PlannedRun) -> list[Finding]:
    """Whether the settings of an adapter agree; nothing where there is none."""
    rank, path = run.get(f"{MODEL}.lora_rank", 0), run.get(f"{MODEL}.lora_adapter_path")
    if other := run.get(f"{MODEL}.lora.rank", 0):
        text = f"{MODEL}.lora.rank={other}: is Megatron's; FSDP would train every weight"
        return [error(text, f"{MODEL}.lora_rank={other} {MODEL}.lora.rank=0")]
    if not rank:
        if path is None:
            return []
        text = f"{MODEL}.lora_adapter_path={path}: is not read while {MODEL}.lora_rank is 0"
        return [error(text, f"{MODEL}.lora_rank, that of the adapter")]
    if run.get(f"{ACTOR}.checkpoint.save_lora_only"):
        text = f"{ACTOR}.checkpoint.save_lora_only=true: no policy can be made of an adapter alone"
        return [error(text, "false")]
    shown = f"rank {rank}, alpha {run.get(f'{MODEL}.lora_alpha')}"
    if run.get(MERGE):
        return [ok(f"{shown}; the rollout gets the sum of weights and adapter")]
    return _apart(run, rank) or [ok(f"{shown}; vLLM gets the adapter apart from the weights")]


def _apart(run: PlannedRun, rank: int) -> list[Finding]:
    """What keeps a rollout from taking the adapter apart from the weights."""
    rollout, fix = run.get(f"{ROLLOUT}.name"), f"{MERGE}=true"
    if rollout != "vllm":
        text = f"{MERGE}=false: the rollout {rollout} takes whole weights only"
        return [error(text, fix)]
    if rank > VLLM_MAX_RANK:
        text = f"{MODEL}.lora_rank={rank}: vLLM takes at most {VLLM_MAX_RANK}"
        return [error(text, f"a smaller one, or {fix}")]
    if "dummy" in run.get(f"{ROLLOUT}.load_format"):
        text = f"{ROLLOUT}.load_format=dummy: with {MERGE}=false vLLM reads the frozen weights"
        return [error(f"{text} itself", f"{ROLLOUT}.load_format=safetensors, or {fix}")]
    return []
