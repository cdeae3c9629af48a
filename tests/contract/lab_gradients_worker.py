"""verl's actor on one batch, once per algorithm; run by test_lab_gradients.py.

Arguments: folder with a tiny model and `batch.pt`, port, algorithms. Advantages come from the
estimator that verl's registry has under the recipe's name, with what a trainer mode of ours
provides; gradients from verl's engine, of vendor `hpo` as `recipes/run` selects it, and the loss
function that our trainer modes give to the actor. Both are written to `verl.pt`.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from hpo_verl.algorithms.registry import LOSSES
from hpo_verl.config.recipes import recipes_directory
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.engine.loss_statistics import loss_with_statistics
from hpo_verl.verl_plugin.losses import ENGINE_VENDOR, loss_settings


def recipe_of(name, width):
    recipe = OmegaConf.load(recipes_directory() / "algo" / f"{name}.yaml")
    context = OmegaConf.create({"data": {"max_response_length": width, "train_batch_size": 4}})
    found = OmegaConf.to_container(OmegaConf.merge(context, recipe), resolve=True)
    if "entropy_coeff" in (actor := found["actor_rollout_ref"]["actor"]):
        actor["entropy_coeff"] = 0.1
    return found


def advantages_of(recipe, batch):
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    mask = batch["mask"].float()
    last = torch.nn.functional.one_hot(batch["mask"].sum(-1) - 1, mask.shape[1]).float()
    section = recipe["algorithm"]
    estimator = section["adv_estimator"]
    groups = batch["groups"] if estimator != "spo" else torch.arange(len(mask))
    extra = {"config": OmegaConf.create(section)}
    if estimator == "grpo":
        extra = {"norm_adv_by_std_in_grpo": section["norm_adv_by_std_in_grpo"]}
    values = dict(enumerate(batch["values"].tolist()))
    given = {name: batch[name] for name in ("entropy", "old_log_prob", "progress", "memory")}
    given |= {name: batch[name] for name in batch if name.startswith("reward/")}
    given[extras.OUTPUT] = batch["output"]
    given[extras.SESSION] = torch.arange(len(mask)) % 4
    reported = []
    with extras.provide(**given, values=values, **{extras.REPORT: reported.append}):
        advantages, _ = get_adv_estimator_fn(estimator)(
            token_level_rewards=last * batch["rewards"][:, None],
            response_mask=mask,
            index=groups.numpy(),
            **extra,
        )
    return advantages, reported[0].result.token_fields if reported else {}


def mini_batch(batch, advantages, given, recipe):
    from verl.utils import tensordict_utils as tu

    mask = batch["mask"]
    lengths = mask.sum(-1).tolist()

    def nested(rows):
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def cut(padded):
        return [row[:length] for row, length in zip(padded, lengths, strict=True)]

    prompts = [
        row[:length]
        for row, length in zip(batch["prompts"], batch["prompt_lengths"].tolist(), strict=True)
    ]
    responses = cut(batch["responses"])
    joined = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    ones = [torch.ones(length, dtype=torch.long) for length in lengths]
    zeros = [torch.zeros(len(prompt), dtype=torch.long) for prompt in prompts]
    policy_loss = recipe["actor_rollout_ref"]["actor"]["policy_loss"]
    loss = LOSSES[policy_loss["loss_mode"]]
    settings = loss_settings(loss, policy_loss)
    extra = {
        name: nested(
            cut(given[name].float() if make is None else make(batch["entropy"], mask, settings))
        )
        for name, make in loss.token_fields.items()
    }
    if recipe["actor_rollout_ref"]["actor"].get("use_kl_loss"):
        extra["ref_log_prob"] = nested(cut(batch["ref_log_prob"]))
    # verl's own choose their tokens within a micro-batch, the lab within the mini-batch.
    parts = 1 if loss.selects and loss.token_loss is None else 2
    return tu.get_tensordict(
        extra
        | {
            "prompts": nested(prompts),
            "responses": nested(responses),
            "input_ids": nested(joined),
            "position_ids": nested([torch.arange(len(ids)) for ids in joined]),
            "loss_mask": nested([torch.cat(p) for p in zip(zeros, ones, strict=True)]),
            "response_mask": nested(ones),
            "old_log_probs": nested(cut(batch["old_log_prob"])),
            "advantages": nested(cut(advantages)),
        },
        non_tensor_dict={
            "temperature": 1.0,
            "global_batch_size": len(lengths),
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": len(lengths) // parts,
            "use_remove_padding": False,
            "use_fused_kernels": False,
            "calculate_entropy": "entropy_coeff" in recipe["actor_rollout_ref"]["actor"],
        },
    )


def actor_config(recipe):
    from hydra.utils import instantiate
    from verl.workers.config import ActorConfig, PolicyLossConfig

    section = dict(recipe["actor_rollout_ref"]["actor"])
    loss = section.pop("policy_loss")
    policy_loss = instantiate(loss) if "_target_" in loss else PolicyLossConfig(**loss)
    return ActorConfig(
        strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss,
        **section,
    )  # fmt: skip


def main(folder, port, algorithms):
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ[ENGINE_VENDOR] = "hpo"
    import verl  # noqa: F401
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=str(folder), load_tokenizer=False, use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, dtype="float32",
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=0.0, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    batch = torch.load(folder / "batch.pt")
    results = {}
    for name in algorithms:
        recipe = recipe_of(name, batch["responses"].shape[1])
        advantages, given = advantages_of(recipe, batch)
        with engine.train_mode():
            engine.optimizer_zero_grad()
            torch.manual_seed(0)
            engine.forward_backward_batch(
                mini_batch(batch, advantages, given, recipe),
                partial(loss_with_statistics, config=actor_config(recipe)),
            )
            gradients = {
                key: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
                for key, p in engine.module.named_parameters()
            }
        results[name] = {"advantages": advantages, "gradients": gradients}
    torch.save(results, folder / "verl.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
