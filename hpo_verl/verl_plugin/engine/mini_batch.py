"""What a loss needs of its whole mini-batch, on all ranks.

verl calls a loss on one micro-batch at a time. verl's engine, however, sees a
rank's whole mini-batch and knows the data-parallel group. `mini_batch_engine`
extends that engine: where the loss is `bapo`, it runs the mini-batch through the
model once more, forward only, lets `bapo.contributions` sum each micro-batch,
adds the sums up over micro-batches and with one all-reduce over ranks, and
leaves the clip bounds that follow in the loss's `policy_loss.batch_info` before
verl's own passes begin. So the bounds know nothing of the split, and every rank
has the same. The price is one forward pass a mini-batch.

Registered for FSDP under the vendor `hpo`, inside the guard of `step_guard`; verl
selects it where the environment variable VERL_ENGINE_VENDOR says so, which the
recipes set for the workers. For every other loss this part changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from hpo_verl.algorithms.bapo import BAPOSettings, ClipBounds, contributions, find_clip_bounds
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.engine.step_guard import guarded_engine
from hpo_verl.verl_plugin.losses import CLIP_BOUNDS, ENGINE_VENDOR, loss_settings, prepare

VENDOR = "hpo"
STRATEGIES = ("fsdp", "fsdp2")
LossFunction = Callable[..., tuple[torch.Tensor, dict[str, Any]]]


def bapo_config(loss_function: Any) -> Any:
    """Return the actor config of a loss function, if its loss is `bapo`.

    Args:
        loss_function: verl's `ppo_loss` or ours, with the config bound by `partial`.
    """
    config = getattr(loss_function, "keywords", {}).get("config")
    policy_loss = getattr(config, "policy_loss", None)
    return config if policy_loss is not None and policy_loss.loss_mode == "bapo" else None


def summing_loss(settings: BAPOSettings, sums: list[torch.Tensor]) -> LossFunction:
    """Make a loss function that notes what a micro-batch contributes, and is 0.

    Args:
        settings: BAPO's.
        sums: Receives the result of `contributions` of every micro-batch.
    """

    def loss_function(
        model_output: dict[str, Any], data: Any, dp_group: Any = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        from verl.workers.utils.padding import no_padding_2_padding

        log_prob = no_padding_2_padding(model_output["log_probs"], data)
        fields = data.select("response_mask", "old_log_probs", "advantages").to_padded_tensor()
        old_log_prob = fields["old_log_probs"]
        mask = fields["response_mask"].to(bool)
        # What is not finite is told where the loss itself is evaluated.
        for tensor in (log_prob, old_log_prob, fields["advantages"]):
            mask = mask & torch.isfinite(tensor)
        batch = prepare(old_log_prob, log_prob, fields["advantages"], mask)
        sums.append(
            contributions(batch.log_ratio, old_log_prob, batch.advantages, batch.mask, settings)
        )
        return log_prob.new_zeros(()), {}

    return loss_function


def mini_batch_engine(parent: type) -> type:
    """Extend an engine of verl by what `bapo` needs.

    Args:
        parent: `FSDPEngineWithLMHead`.
    """

    class MiniBatchEngine(parent):
        """verl's engine; for `bapo` it finds the clip bounds of a mini-batch first."""

        def forward_backward_batch(
            self, data: Any, loss_function: LossFunction | None, forward_only: bool = False
        ) -> Any:
            """Follow verl's interface; the bounds and the share appear in the metrics."""
            config = None if forward_only else bapo_config(loss_function)
            if config is None:
                return super().forward_backward_batch(data, loss_function, forward_only)
            bounds = self._clip_bounds(data, loss_settings(BAPOSettings, config.policy_loss))
            config.policy_loss.batch_info[CLIP_BOUNDS] = bounds
            try:
                output = super().forward_backward_batch(data, loss_function, forward_only)
            finally:
                del config.policy_loss.batch_info[CLIP_BOUNDS]
            for name, value in bounds._asdict().items():
                output["metrics"][f"actor/bapo_{name}"] = [value]
            return output

        def _clip_bounds(self, data: Any, settings: BAPOSettings) -> ClipBounds:
            sums: list[torch.Tensor] = []
            with torch.no_grad():
                super().forward_backward_batch(data, summing_loss(settings, sums), True)
            total = torch.stack(sums).sum(dim=0)
            torch.distributed.all_reduce(total, group=self.get_data_parallel_group())
            return find_clip_bounds(total.tolist(), settings)

    return MiniBatchEngine


def check_engine(config: Mapping[str, Any]) -> None:
    """Refuse the loss `bapo` where verl would select another engine.

    Args:
        config: verl's whole configuration.

    Raises:
        ConfigError: The environment of the workers does not select our engine, or the strategy
            has none.
    """
    actor = config["actor_rollout_ref"]["actor"]
    if actor["policy_loss"].get("loss_mode", None) != "bapo":
        return
    strategy = actor.get("strategy", None)
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"actor_rollout_ref.actor.strategy = {strategy!r}: policy_loss.loss_mode = 'bapo' "
            f"permits {' and '.join(STRATEGIES)} only"
        )
    node: Any = config
    for name in ("ray_kwargs", "ray_init", "runtime_env", "env_vars"):
        node = (node.get(name, None) if node is not None else None) or {}
    vendor = node.get(ENGINE_VENDOR, None) or os.environ.get(ENGINE_VENDOR)
    if vendor != VENDOR:
        raise ConfigError(
            f"ray_kwargs.ray_init.runtime_env.env_vars.{ENGINE_VENDOR} = {vendor!r}: "
            f"policy_loss.loss_mode = 'bapo' needs {VENDOR!r}, as recipes/run/default.yaml sets it"
        )


@cache
def register() -> None:
    """Register the engine with verl; a second call changes nothing."""
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    EngineRegistry.register(
        model_type="language_model",
        backend=list(STRATEGIES),
        device=["cuda", "npu", "cpu"],
        vendor=VENDOR,
    )(guarded_engine(mini_batch_engine(FSDPEngineWithLMHead)))
