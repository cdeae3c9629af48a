"""Micro-batches for policy losses, and how verl calls a loss on them."""

import pytest
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from hpo_verl.algorithms.catalog import LOSS_AGG_MODES

OURS = [(name, mode) for name, modes in LOSS_AGG_MODES.items() for mode in modes]
BOTH = pytest.mark.parametrize(("name", "mode"), OURS)


def actor_config(mode="token-mean", policy_loss=None, counts=None, **changes):
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=mode,
        policy_loss=policy_loss or PolicyLossConfig(),
        **changes,
    )
    config.global_batch_info.update(counts or {})
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


def evaluate(name, batch, mode="token-mean", config=None, weights=None):
    """Return loss, gradient and metrics, called as verl calls it."""
    leaf = batch["log_prob"].detach().clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        **{**batch, "log_prob": leaf},
        loss_agg_mode=mode,
        config=config or actor_config(mode),
        rollout_is_weights=weights,
    )
    loss.backward()
    return loss.detach(), leaf.grad, metrics
