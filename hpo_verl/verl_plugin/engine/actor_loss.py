"""verl's loss of the actor, with what the records of our losses add to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.losses import loss_settings, selected_loss

ENTROPY_PENALTY = "actor/entropy_penalty"
"""What is taken off the entropy, nats, aggregated like it."""


def actor_loss(
    config: Any,
    model_output: dict[str, Any],
    data: Any,
    dp_group: Any = None,
    *,
    fields: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Evaluate verl's `ppo_loss` on a micro-batch, and add the loss's entropy penalty.

    `fields` are the loss's token fields, padded; they are provided to it meanwhile.
    """
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import no_padding_2_padding

    record = selected_loss(config.policy_loss)
    with extras.provide(**fields):
        loss, metrics = ppo_loss(config, model_output, data, dp_group)
    entropy = model_output.get("entropy")
    if record is None or record.entropy_penalty is None or entropy is None:
        return loss, metrics
    entropy = no_padding_2_padding(entropy, data)
    mask = data["response_mask"]
    mask = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
    settings = loss_settings(record, config.policy_loss)
    penalty = agg_loss(
        record.entropy_penalty(entropy, mask, fields, settings),
        mask,
        config.loss_agg_mode,
        **config.global_batch_info,
    )
    metrics = metrics | {ENTROPY_PENALTY: Metric(AggregationType.SUM, penalty.detach())}
    return loss + config.entropy_coeff * penalty, metrics
