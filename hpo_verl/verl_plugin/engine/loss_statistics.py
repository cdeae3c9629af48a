"""What the policy loss did to the tokens, for every loss that verl knows.

verl asks a loss for plain numbers and averages them over micro-batches of unequal size. Here the
policy loss is evaluated once more beside the actor's loss, on a leaf copy of the
log-probabilities. That yields the exact gradient of every token whatever the loss. The extra work
is elementwise and touches no model.
"""

from __future__ import annotations

from typing import Any

import torch

from hpo_verl.core.ratios import bound_log_ratio, masked_log_ratio
from hpo_verl.core.statistics import token_means, token_sums
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.engine.actor_loss import actor_loss
from hpo_verl.verl_plugin.losses import selected_loss

PREFIX = "actor/hpo_sums/"
"""Keys under which the sums travel from the workers to the trainer."""


def loss_with_statistics(
    config: Any, model_output: dict[str, Any], data: Any, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Evaluate `actor_loss` on a nested micro-batch, and add sums over tokens to its metrics.

    The fields that the loss reads and verl does not pass to it are provided meanwhile.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    record = selected_loss(config.policy_loss)
    names = () if record is None else record.fields
    fields = {name: data[name].to_padded_tensor(0.0) for name in names if name in data}
    made = [name for name in names if name in model_output]
    fields |= {name: no_padding_2_padding(model_output[name], data) for name in made}
    loss, metrics = actor_loss(config, model_output, data, dp_group, fields=fields)
    with extras.provide(**fields):
        sums = policy_loss_sums(config, model_output, data)
    return loss, metrics | {
        f"{PREFIX}{name}": Metric(AggregationType.SUM, value) for name, value in sums.items()
    }


def policy_loss_sums(config: Any, model_output: dict[str, Any], data: Any) -> dict[str, float]:
    """Sum ratio, clipping and gradient over the tokens of a nested micro-batch (`token_sums`).

    `ppo_loss` has set `global_batch_info` of verl's actor config before. Gradients are those of
    the policy loss alone, without entropy and KL terms.
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
    """Take the sums out of a step's metrics, as the means that are logged (`token_means`)."""
    keys = [key for key in metrics if key.startswith(PREFIX)]
    sums = {key.removeprefix(PREFIX): float(metrics.pop(key)) for key in keys}
    return token_means(sums) if sums else {}
