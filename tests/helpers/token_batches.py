"""Micro-batches as a loss per token sees them."""

import torch

from hpo_verl.algorithms.base import TokenBatch


def token_batch(log_ratio, advantages, clip_range=(0.0, 0.0), **extras):
    mask = torch.ones_like(log_ratio, dtype=torch.bool)
    return TokenBatch(log_ratio, advantages, mask, torch.zeros_like(log_ratio), clip_range, extras)
