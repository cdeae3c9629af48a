"""What a loss needs of its whole mini-batch, on all ranks.

verl calls a loss on one micro-batch at a time. Where the record of the loss has `mini_batch_sums`,
the engine here runs the mini-batch through the model once more, forward only, adds the sums up over
micro-batches and ranks, and provides the result to the loss (`extras`) while verl's own passes run.
So the result knows nothing of the split. The price is one forward pass a mini-batch.

Registered for FSDP under the vendor `hpo`, inside the guard of `step_guard`; verl selects it where
the environment variable VERL_ENGINE_VENDOR says so, which the recipes set for the workers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from hpo_verl.algorithms.base import Loss, MiniBatchSums
from hpo_verl.verl_plugin import extras
from hpo_verl.verl_plugin.engine.head import head_engine
from hpo_verl.verl_plugin.engine.merged_adapter import adapter_engine
from hpo_verl.verl_plugin.engine.objectives import objectives_engine
from hpo_verl.verl_plugin.engine.step_guard import guarded_engine
from hpo_verl.verl_plugin.losses import STRATEGIES, VENDOR, loss_of, prepare

LossFunction = Callable[..., tuple[torch.Tensor, dict[str, Any]]]


def summing_loss(
    mini_batch_sums: MiniBatchSums, settings: Any, sums: list[torch.Tensor]
) -> LossFunction:
    """Make a loss function that is 0 and adds what each micro-batch contributes to `sums`."""

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
        sums.append(mini_batch_sums.contributions(batch.tokens, settings))
        return log_prob.new_zeros(()), {}

    return loss_function


def mini_batch_engine(parent: type) -> type:
    """Extend `FSDPEngineWithLMHead` by sums over mini-batches."""

    class MiniBatchEngine(parent):
        """verl's engine; where a loss needs sums of a mini-batch, it takes them first."""

        def forward_backward_batch(
            self, data: Any, loss_function: LossFunction | None, forward_only: bool = False
        ) -> Any:
            """Follow verl's interface; what is made of the sums appears in the metrics."""
            found = None if forward_only else loss_of(loss_function)
            if found is None or found[0].mini_batch_sums is None:
                return super().forward_backward_batch(data, loss_function, forward_only)
            loss, settings = found
            result = self._sum(data, loss, settings)
            with extras.provide(**{extras.MINI_BATCH: result}):
                output = super().forward_backward_batch(data, loss_function, forward_only)
            for name, value in result._asdict().items():
                output["metrics"][f"actor/{name}"] = [value]
            return output

        def _sum(self, data: Any, loss: Loss, settings: Any) -> Any:
            assert loss.mini_batch_sums is not None  # noqa: S101 - for the type checker
            sums: list[torch.Tensor] = []
            with torch.no_grad():
                summing = summing_loss(loss.mini_batch_sums, settings, sums)
                super().forward_backward_batch(data, summing, True)
            total = torch.stack(sums).sum(dim=0)
            torch.distributed.all_reduce(total, group=self.get_data_parallel_group())
            return loss.mini_batch_sums.result(total.tolist(), settings)

    return MiniBatchEngine


@cache
def register(engines: Any) -> None:
    """Register the engine with verl; a second call changes nothing."""
    engine = mini_batch_engine(head_engine(engines.FSDPEngineWithLMHead))
    engine = adapter_engine(objectives_engine(engine))
    engines.EngineRegistry.register(
        model_type="language_model",
        backend=list(STRATEGIES),
        device=["cuda", "npu", "cpu"],
        vendor=VENDOR,
    )(guarded_engine(engine))
