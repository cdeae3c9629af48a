"""Micro-batches for policy losses, and how verl calls a loss on them."""

import copy

import pytest
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from hpo_verl.algorithms.catalog import LOSS_AGG_MODES
from hpo_verl.verl_plugin.config import HAPOPolicyLossConfig

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


INFORMED = {"hapo": HAPOPolicyLossConfig}


def supplied(name, config, batch):
    """The config with what workers give some losses beyond verl's arguments."""
    if name not in INFORMED:
        return config
    policy_loss = config.policy_loss
    policy_loss = (
        copy.deepcopy(policy_loss) if hasattr(policy_loss, "batch_info") else INFORMED[name]()
    )
    if name == "hapo":
        # Some function of the token with values in [-1, 1], NaN where the token's are.
        deviation = torch.sin(7 * batch["old_log_prob"].detach().float())
        policy_loss.batch_info["entropy_deviation"] = deviation
    config = copy.copy(config)
    config.__dict__["policy_loss"] = policy_loss
    return config


def evaluate(name, batch, mode="token-mean", config=None, weights=None):
    """Return loss, gradient and metrics, called as verl calls it."""
    config = supplied(name, config or actor_config(mode), batch)
    leaf = batch["log_prob"].detach().clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        **{**batch, "log_prob": leaf},
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    return loss.detach(), leaf.grad, metrics
