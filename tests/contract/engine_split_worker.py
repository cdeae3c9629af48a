"""One rank of verl's FSDP2 engine on CPU; run by test_engine_split.py.

Arguments: rank, folder with a tiny model, port of a group of one, port of a group of two.
Rank 0 first trains one mini-batch alone, padded and with torch's attention, in one piece. All
else is packed, through flash attention and its cross-entropy, as on GPUs: rank 0 alone in 1, 2
and 8 micro-batches and in those that fit a number of tokens; then both ranks together, half of
the mini-batch each; last with a copy of the weights each. Gradients, statistics and what the
model returned are written to the folder. Adam has made a step of length 0 before, for its moments.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from hpo_verl.algorithms.registry import LOSSES

TOKENS = 24
"""How many fit into a micro-batch of dynamic size; the longest two sequences are 12 tokens."""
LR, FISHER = 0.01, 0.014
"""Length of the step that CAPO asks about, which is never made, and a bound that some reach."""
PADDED = {"use_remove_padding": False, "override_config": {"attn_implementation": "sdpa"}}
# verl's own values, for the model of a test in float32.
PACKED = {"use_remove_padding": True, "override_config": {}}


def mini_batch(rows, micro_batch_size, packed=True):
    """The same eight responses everywhere, of which `rows` are taken.

    A micro-batch has so many rows, or as many as fit into `TOKENS` where the number is None.
    """
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(0)
    prompts, responses, masks, old, advantages, deviations = [], [], [], [], [], []
    for row in range(8):
        length = 2 + (5 * row) % 7
        prompts.append(torch.randint(0, 32, (3 + row % 2,), generator=generator))
        responses.append(torch.randint(0, 32, (length,), generator=generator))
        mask = torch.ones(length, dtype=torch.long)
        mask[1] = row % 3 != 0  # a token of a tool
        masks.append(mask if row != 5 else torch.zeros_like(mask))  # a padding row
        old.append(-3.5 + 0.5 * torch.randn(length, generator=generator))
        advantages.append(torch.full((length,), 1.5 if row % 2 else -0.25))
        deviations.append(2 * torch.rand(length, generator=generator) - 1)

    def nested(tensors):
        return torch.nested.as_nested_tensor([tensors[row] for row in rows], layout=torch.jagged)

    joined = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    loss_masks = [
        torch.cat([torch.zeros_like(prompt), mask])
        for prompt, mask in zip(prompts, masks, strict=True)
    ]
    return tu.get_tensordict(
        {
            "prompts": nested(prompts),
            "responses": nested(responses),
            "input_ids": nested(joined),
            "position_ids": nested([torch.arange(len(ids)) for ids in joined]),
            "loss_mask": nested(loss_masks),
            "response_mask": nested(masks),
            "old_log_probs": nested(old),
            "advantages": nested(advantages),
            **{name: nested(deviations) for one in LOSSES.values() for name in one.token_fields},
        },
        non_tensor_dict={
            "temperature": 1.0,
            "global_batch_size": 8,
            "use_dynamic_bsz": micro_batch_size is None,
            "micro_batch_size_per_gpu": micro_batch_size,
            "max_token_len_per_gpu": TOKENS,
            "use_remove_padding": packed,
            "use_fused_kernels": False,
            "calculate_entropy": False,
        },
    )


def gradients(engine):
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in engine.module.named_parameters()
        if p.grad is not None
    }


def make_engine(model_path, lr=0.0, path=None, fsdp_size=-1, **model):
    """verl's engine for a tiny model, on the ranks of the process group."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=str(model_path),
            load_tokenizer=False,
            enable_gradient_checkpointing=True,
            **(path or PACKED),
            **model,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            fsdp_size=fsdp_size,
            dtype="float32",
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=lr, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def train(model_path, rank, world, packed=True):
    """Return gradients, sums of statistics and clip bounds for every loss and split."""
    from verl.utils.metric import Metric

    from hpo_verl.algorithms.registry import OUR_LOSSES
    from hpo_verl.verl_plugin.config import SECTIONS
    from hpo_verl.verl_plugin.engine.loss_statistics import PREFIX, loss_with_statistics

    engine = make_engine(model_path, path=PACKED if packed else PADDED)
    share = 8 // world
    rows = range(rank * share, (rank + 1) * share)
    # Rows of a micro-batch by the number of them on all ranks.
    splits = {parts * world: share // parts for parts in (1, 2, 8 // world)}
    splits = splits | {"tokens": None} if packed else {1: 8}
    results = {"outputs": outputs(engine, mini_batch(rows, None, packed))}
    special = {
        # A share that the upper bound reaches on its way.
        "bapo": SECTIONS["bapo"](positive_share=0.77, clip_high_start=1.0),
        # Bounds for the step that Adam would make.
        "capo": SECTIONS["capo"](hessian_low=-1.0, hessian_high=1.0, fisher_high=FISHER),
    }
    with_moments(engine, mini_batch(rows, None, packed))
    for loss, record in OUR_LOSSES.items():
        for mode in record.aggregations:
            for name, size in splits.items():
                config = actor_config(special.get(loss, loss), mode)
                with engine.train_mode():
                    engine.optimizer_zero_grad()
                    output = engine.forward_backward_batch(
                        mini_batch(rows, size, packed),
                        partial(loss_with_statistics, config=config),
                    )
                    gathered = [None] * world
                    dist.all_gather_object(gathered, output["metrics"])
                    # As verl's TrainingWorker reduces them over ranks and micro-batches.
                    sums = {
                        key.removeprefix(PREFIX): Metric.aggregate_dp(
                            [rank_metrics[key] for rank_metrics in gathered]
                        )
                        for key in gathered[0]
                        if key.startswith(PREFIX)
                    }
                    bounds = {
                        key: value
                        for key, value in output["metrics"].items()
                        if key.startswith(("actor/bapo_", "actor/curvature_"))
                    }
                    results[loss, mode, name] = (gradients(engine), sums, bounds)
    return results | {"calls": calls()}


def actor_config(policy_loss="hpo", mode="token-mean"):
    from verl.workers.config import ActorConfig, PolicyLossConfig

    if isinstance(policy_loss, str):
        policy_loss = PolicyLossConfig(loss_mode=policy_loss)
    return ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=mode,
        # Without one verl takes the width of the micro-batch.
        loss_scale_factor=7,
        policy_loss=policy_loss,
    )


def with_moments(engine, data):
    """Let Adam see a gradient in a step of length 0, and then have a length."""
    from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics

    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(data, partial(loss_with_statistics, config=actor_config()))
        engine.optimizer.step()
    for group in engine.optimizer.param_groups:
        group["lr"] = LR


def outputs(engine, data):
    """Log-probabilities and entropies of the rows, as verl computes the old ones."""
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor(data, calculate_entropy=True)
    with engine.eval_mode():
        found = engine.forward_backward_batch(data, None, forward_only=True)["model_output"]
    return {name: [row.clone() for row in found[name].unbind()] for name in found}


def calls():
    """Sequences that went through the stand-in for flash attention so far."""
    from flash_attn import sequences_seen

    return dict(sequences_seen)


def train_copies(model_path, rank):
    """Mesh, gradients and their norm where each of the two ranks has a copy of its own."""
    from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics

    engine = make_engine(model_path, fsdp_size=1)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(
            mini_batch(range(4 * rank, 4 * rank + 4), 2),
            partial(loss_with_statistics, config=actor_config()),
        )
        found, norm = gradients(engine), engine.optimizer_step()
    mesh = engine.module.lm_head.weight.device_mesh
    return mesh.mesh_dim_names, tuple(mesh.shape), found, norm


def main(rank, folder, alone, together):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    import verl  # noqa: F401

    if rank == 0:
        os.environ["WORLD_SIZE"] = "1"
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{alone}", rank=0, world_size=1
        )
        os.environ["VERL_DISABLE_FLASH_ATTN_CE"] = "1"
        torch.save(train(folder, 0, 1, packed=False), folder / "padded.pt")
        del os.environ["VERL_DISABLE_FLASH_ATTN_CE"]
        # Here transformers takes the padding out for flash attention, and puts it back.
        engine = make_engine(folder, path={**PACKED, "use_remove_padding": False})
        unpadded = outputs(engine, mini_batch(range(8), None, packed=False))
        torch.save({"outputs": unpadded, "calls": calls()}, folder / "unpadded.pt")
        torch.save(train(folder, 0, 1), folder / "one.pt")
        dist.destroy_process_group()
    os.environ["WORLD_SIZE"] = "2"
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{together}", rank=rank, world_size=2
    )
    results = train(folder, rank, 2)
    if rank == 0:
        torch.save(results, folder / "two.pt")
    copies = train_copies(folder, rank)
    torch.save(copies, folder / f"copies{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5])
