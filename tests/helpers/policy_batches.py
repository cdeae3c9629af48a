"""Micro-batches for policy losses, and how verl calls a loss on them."""

import copy

import pytest
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from hpo_verl.algorithms.bapo import BAPOSettings, ClipBounds, contributions, find_clip_bounds
from hpo_verl.algorithms.catalog import LOSS_AGG_MODES
from hpo_verl.verl_plugin.config import BAPOPolicyLossConfig, HAPOPolicyLossConfig
from hpo_verl.verl_plugin.losses import loss_settings

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


INFORMED = {"bapo": BAPOPolicyLossConfig, "hapo": HAPOPolicyLossConfig}


def bounds_of(batch, settings):
    """BAPO's clip bounds, as if this were the whole mini-batch."""
    log_prob, old, advantages, mask = (
        batch[key].detach().double()
        for key in ("log_prob", "old_log_prob", "advantages", "response_mask")
    )
    if len({tensor.shape for tensor in (log_prob, old, advantages, mask)}) > 1:
        return ClipBounds(0.8, 1.2, 0.5)
    mask = mask.bool()
    log_ratio = torch.where(mask, log_prob - old, 0).nan_to_num(0).clamp(-20, 20)
    sums = contributions(log_ratio, old, torch.where(mask, advantages, 0), mask, settings)
    return find_clip_bounds(sums.tolist(), settings)


def supplied(name, config, batch):
    """The config with what workers give some losses beyond verl's arguments."""
    if name not in INFORMED:
        return config
    typed = isinstance(config.policy_loss, INFORMED[name])
    policy_loss = copy.deepcopy(config.policy_loss) if typed else INFORMED[name]()
    if name == "hapo":
        # Some function of the token with values in [-1, 1], NaN where the token's are.
        deviation = torch.sin(7 * batch["old_log_prob"].detach().float())
        policy_loss.batch_info["entropy_deviation"] = deviation
    elif not policy_loss.batch_info:
        settings = loss_settings(BAPOSettings, policy_loss)
        policy_loss.batch_info["clip_bounds"] = bounds_of(batch, settings)
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
