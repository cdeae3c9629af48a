"""Micro-batches for policy losses, and how verl calls a loss on them."""

import pytest
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from hpo_verl.algorithms.base import TokenBatch
from hpo_verl.algorithms.registry import OUR_LOSSES
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.losses import loss_settings

OURS = [(name, mode) for name, record in OUR_LOSSES.items() for mode in record.aggregations]
BOTH = pytest.mark.parametrize(("name", "mode"), OURS)


def actor_config(mode="token-mean", policy_loss=None, counts=None, **changes):
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=mode,
        policy_loss=policy_loss or PolicyLossConfig(),
        # Off, as in the recipes.
        **{"clip_ratio_c": 1e9, **changes},
    )
    info = config.global_batch_info
    info.update(counts or {})
    if mode == "seq-mean-token-sum-norm" and not info.get("loss_scale_factor"):
        # Without one verl takes the width of the micro-batch.
        info["loss_scale_factor"] = 7
    return config


def make_batch(rows=8, width=12, seed=0, dtype=torch.float32, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=generator, dtype=torch.float64)
    log_prob = old + scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    sign = torch.where(torch.arange(rows)[:, None] % 2 == 0, 1.0, -1.0)
    advantages = sign * (0.5 + torch.rand(rows, 1, generator=generator))
    return {
        "old_log_prob": old.to(dtype),
        "log_prob": log_prob.to(dtype),
        "advantages": advantages.expand(rows, width).clone().to(dtype),
        "response_mask": torch.arange(width).expand(rows, width) < lengths,
    }


def counts_of(mask, dp_size=1):
    return {
        "dp_size": dp_size,
        "batch_num_tokens": int(mask.sum()),
        "global_batch_size": len(mask),
        "loss_scale_factor": None,
    }


def provided_to(name, config, batch):
    """What workers provide to a loss beyond verl's arguments, as if this were the mini-batch."""
    record, mask = OUR_LOSSES[name], batch["response_mask"]
    log_prob, old, advantages = (
        batch[key].detach() for key in ("log_prob", "old_log_prob", "advantages")
    )
    # Some function of the token with values in [-1, 1], NaN where the token's are.
    found = {field: torch.sin(7 * old.float()) for field in record.fields}
    sums = record.mini_batch_sums
    if sums is not None and len({t.shape for t in (log_prob, old, advantages, mask)}) > 1:
        found[extras.MINI_BATCH] = sums.kind(0.8, 1.2, 0.5)
    elif sums is not None:
        live = mask.bool()
        log_ratio = torch.where(live, log_prob.double() - old.double(), 0).nan_to_num(0)
        advantages, old = (torch.where(live, one.double(), 0) for one in (advantages, old))
        tokens = TokenBatch(log_ratio.clamp(-20, 20), advantages, live, old)
        settings = loss_settings(record, config.policy_loss)
        total = sums.contributions(tokens, settings)
        found[extras.MINI_BATCH] = sums.result(total.tolist(), settings)
    return found


def evaluate(name, batch, mode="token-mean", config=None, weights=None, provided=None):
    """Return loss, gradient and metrics, called as verl calls it."""
    config = config or actor_config(mode)
    if provided is None:
        provided = provided_to(name, config, batch) if name in OUR_LOSSES else {}
    leaf = batch["log_prob"].detach().clone().requires_grad_()
    with extras.provide(**provided):
        loss, metrics = get_policy_loss_fn(name)(
            **{**batch, "log_prob": leaf},
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=weights,
        )
    loss.backward()
    return loss.detach(), leaf.grad, metrics
