"""What the policy loss did to the tokens, for every loss that verl knows.

verl asks a loss for plain numbers and averages them over micro-batches of
unequal size. Here the loss function of the actor is verl's own `ppo_loss`;
beside it, the policy loss is evaluated once more on a leaf copy of the
log-probabilities, which yields the exact gradient of every token whatever
the loss. The extra work is elementwise and touches no model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from hpo_verl.core.ratios import bound_log_ratio, masked_log_ratio
from hpo_verl.core.statistics import token_means, token_sums
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.losses import selected_loss

PREFIX = "actor/hpo_sums/"
"""Keys under which the sums travel from the workers to the trainer."""


def token_fields(config: Any, data: Any) -> AbstractContextManager[None]:
    """Provide the fields of a micro-batch that its loss reads and verl does not pass to it.

    Args:
        config: verl's actor config.
        data: The micro-batch, nested.
    """
    loss = selected_loss(config.policy_loss)
    names = () if loss is None else loss.token_fields
    return extras.provide(
        **{name: data[name].to_padded_tensor(0.0) for name in names if name in data}
    )


def loss_with_statistics(
    config: Any, model_output: dict[str, Any], data: Any, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Evaluate verl's `ppo_loss` and add sums over tokens to its metrics.

    Args:
        config: verl's actor config.
        model_output: Holds `log_probs`, nested.
        data: The micro-batch, nested.
        dp_group: Data-parallel group.

    Returns:
        Loss and metrics of `ppo_loss`, the metrics with the keys of `token_sums` added.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.losses import ppo_loss

    with token_fields(config, data):
        loss, metrics = ppo_loss(config, model_output, data, dp_group)
        sums = policy_loss_sums(config, model_output, data)
    return loss, metrics | {
        f"{PREFIX}{name}": Metric(AggregationType.SUM, value) for name, value in sums.items()
    }


def policy_loss_sums(config: Any, model_output: dict[str, Any], data: Any) -> dict[str, float]:
    """Sum ratio, clipping and gradient over the tokens of a micro-batch, by sign.

    Args:
        config: verl's actor config, its `global_batch_info` already set by `ppo_loss`.
        model_output: Holds `log_probs`, nested.
        data: The micro-batch, nested.

    Returns:
        See `hpo_verl.core.statistics.token_sums`. Gradients are those of the policy loss alone,
        without entropy and KL terms.
    """
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.utils.padding import no_padding_2_padding

    log_prob = no_padding_2_padding(model_output["log_probs"], data).detach().requires_grad_()
    fields = ["response_mask", "old_log_probs", "advantages"]
    if "rollout_is_weights" in data:
        fields.append("rollout_is_weights")
    tensors = data.select(*fields).to_padded_tensor()
    mask = tensors["response_mask"].to(bool)
    policy_loss: Any = get_policy_loss_fn(config.policy_loss.get("loss_mode", "vanilla"))
    # Losses that draw at random must not draw from the training's own stream.
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        loss, _ = policy_loss(
            old_log_prob=tensors["old_log_probs"],
            log_prob=log_prob,
            advantages=tensors["advantages"],
            response_mask=mask,
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=tensors.get("rollout_is_weights", None),
        )
        (gradient,) = torch.autograd.grad(loss, log_prob)
    log_ratio = masked_log_ratio(log_prob.detach(), tensors["old_log_probs"], mask)
    return token_sums(bound_log_ratio(log_ratio).exp(), tensors["advantages"], gradient, mask)


def pop_token_means(metrics: dict[str, Any]) -> dict[str, float]:
    """Take the sums out of a step's metrics and turn them into what is logged.

    Args:
        metrics: Metrics of the actor's update; the sums are removed from it.

    Returns:
        See `hpo_verl.core.statistics.token_means`; empty if the update brought no sums.
    """
    keys = [key for key in metrics if key.startswith(PREFIX)]
    sums = {key.removeprefix(PREFIX): float(metrics.pop(key)) for key in keys}
    return token_means(sums) if sums else {}
