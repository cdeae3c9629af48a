"""verl's loss of the actor, with what the records of our losses change in its terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.losses import loss_settings, selected_loss

ENTROPY_PENALTY = "actor/entropy_penalty"
"""What is taken off the entropy, nats, aggregated like it."""

Fields = Mapping[str, torch.Tensor]
"""Token fields of a loss by name, `[batch, response]`."""


def actor_loss(
    config: Any,
    model_output: dict[str, Any],
    data: Any,
    dp_group: Any = None,
    *,
    fields: Fields,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Evaluate verl's `ppo_loss` on a micro-batch, with the penalty and weights of the loss.

    `fields`, padded, are provided to the policy loss meanwhile.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import no_padding_2_padding

    with extras.provide(**fields):
        loss, metrics = ppo_loss(config, model_output, data, dp_group)
    record = selected_loss(config.policy_loss)
    if record is None or not (record.entropy_penalty or record.kl_weight):
        return loss, metrics
    mask = _padded(data["response_mask"]).bool()
    if (entropy := model_output.get("entropy")) is not None:
        penalty = entropy_penalty(config, no_padding_2_padding(entropy, data), mask, fields)
        if penalty is not None:
            loss = loss + config.entropy_coeff * penalty
            metrics = metrics | {ENTROPY_PENALTY: Metric(AggregationType.SUM, penalty.detach())}
    if config.use_kl_loss:
        log_prob = no_padding_2_padding(model_output["log_probs"], data)
        added = added_kl(config, log_prob, _padded(data["ref_log_prob"]), mask, fields)
        if added is not None:
            loss = loss + config.kl_loss_coef * added
    return loss, metrics


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor


def _mean(config: Any, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Aggregate as `ppo_loss` does, with the counts that it has set."""
    from verl.trainer.ppo.core_algos import agg_loss

    return agg_loss(values, mask, config.loss_agg_mode, **config.global_batch_info)


def entropy_penalty(
    config: Any, entropy: torch.Tensor, mask: torch.Tensor, fields: Fields
) -> torch.Tensor | None:
    """What the loss takes off the aggregated entropy, nats; None for nothing."""
    record = selected_loss(config.policy_loss)
    if record is None or record.entropy_penalty is None:
        return None
    settings = loss_settings(record, config.policy_loss)
    return _mean(config, record.entropy_penalty(entropy, mask, fields, settings), mask)


def added_kl(
    config: Any, log_prob: torch.Tensor, ref_log_prob: torch.Tensor, mask: torch.Tensor,
    fields: Fields,
) -> torch.Tensor | None:  # fmt: skip
    """What the weights of the loss add to verl's aggregated KL term, nats; None for nothing."""
    from verl.trainer.ppo.core_algos import kl_penalty

    record = selected_loss(config.policy_loss)
    if record is None or not record.kl_weight:
        return None
    # verl's type says FloatTensor, of which a tensor is none.
    divergence: Any = kl_penalty
    kl = divergence(log_prob, ref_log_prob, config.kl_loss_type)
    return _mean(config, (fields[record.kl_weight] - 1.0) * kl, mask)
