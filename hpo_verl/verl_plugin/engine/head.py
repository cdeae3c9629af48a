"""What a loss needs of the head of the model: its input, its logits and its optimizer's state.

verl gives a loss log-probabilities only. Where the record of the loss has `head_fields`, the engine
here catches what the head reads in verl's own training pass, and makes the fields of every token
beside verl's log-probabilities; there is no further pass. Once a mini-batch the averages of Adam
for the head's weights are gathered whole from FSDP's shards on each rank: two matrices of the
vocabulary by the hidden size.

Logged: the mean of each field over the live tokens of the mini-batch, and as
`actor/head_seconds_fraction` the part of the mini-batch's time that all of this takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hpo_verl.algorithms.base import HeadOptimizer, HeadTokens, Loss
from hpo_verl.errors import ConfigError
from hpo_verl.verl_plugin.losses import ACTOR, loss_of

LOGITS = 1 << 26
"""Entries of logits in float32 that are held at once, 256 MiB."""

SECONDS = "actor/head_seconds_fraction"


def head_optimizer(weight: torch.Tensor, optimizer: Any) -> HeadOptimizer:
    """Read how Adam stands with the head's weights; on all ranks together.

    Raises:
        ConfigError: The optimizer does not train them, or is another one.
    """
    groups = [g for g in optimizer.param_groups if any(p is weight for p in g["params"])]
    if not groups:
        raise ConfigError("the policy loss reads the optimizer of the model's head, which has none")
    group, state = groups[0], optimizer.state.get(weight, {})
    if "betas" not in group or (state and "exp_avg_sq" not in state):
        raise ConfigError(f"{ACTOR}.optim.optimizer: the policy loss needs Adam or AdamW")
    moments = None
    if state:
        moments = _whole(state["exp_avg"]), _whole(state["exp_avg_sq"])
    return HeadOptimizer(
        lr=float(group["lr"]),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        epsilon=float(group["eps"]),
        steps=int(state.get("step", 0)),
        moments=moments,
    )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Watch:
    """What is seen of the head during one mini-batch on this rank."""

    def __init__(self, loss: Loss, settings: Any) -> None:
        self._loss = loss
        self._settings = settings
        self._hidden: torch.Tensor | None = None
        self._optimizer: HeadOptimizer | None = None
        self._sums: list[torch.Tensor] = []
        self._seconds = 0.0

    @contextmanager
    def on(self, module: Any, optimizer: Any) -> Iterator[None]:
        """Catch what the head of the module reads while what is inside runs."""
        head = module.get_output_embeddings()
        with self._timed():
            if hasattr(module, "reshard"):
                # An evaluation may have left whole weights behind, which no optimizer knows.
                module.reshard()
            self._optimizer = head_optimizer(head.weight, optimizer)
        hook = head.register_forward_pre_hook(self._catch)
        try:
            yield
        finally:
            hook.remove()

    def _catch(self, head: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._hidden = inputs[0].detach()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        _finish_kernels()
        start = time.perf_counter()
        yield
        _finish_kernels()
        self._seconds += time.perf_counter() - start

    @torch.no_grad()
    def fields(self, logits: torch.Tensor, data: Any, packed: bool) -> dict[str, torch.Tensor]:
        """Make the loss's fields of a nested micro-batch, placed as verl's log-probabilities.

        Args:
            logits: The model's, `[1, tokens, vocabulary]` where packed, else
                `[batch, length, vocabulary]`, padded on the right.
            data: The micro-batch.
            packed: Whether verl has removed the padding.
        """
        head_fields, optimizer, hidden = self._loss.head_fields, self._optimizer, self._hidden
        # For the type checker; the model has called the head.
        assert head_fields is not None  # noqa: S101
        assert optimizer is not None  # noqa: S101
        assert hidden is not None  # noqa: S101
        with self._timed():
            lengths = data["responses"].offsets().diff()
            row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
            # The place before a token of the response is where it is predicted.
            inside = torch.arange(len(row), device=row.device) - data["responses"].offsets()[row]
            inside = inside + data["prompts"].offsets().diff()[row] - 1
            offsets = data["input_ids"].offsets()
            mask = data["response_mask"].values().bool()
            advantages = data["advantages"].values().float()
            live = mask & (advantages != 0)
            place = offsets[row] + inside
            seen = place if packed else row * logits.shape[1] + inside
            temperature = torch.as_tensor(data["temperature"], device=row.device).float()
            temperature = temperature.expand(len(lengths))[row].unsqueeze(-1)
            tokens, parts = data["responses"].values(), []
            # Each token by itself, so that no second copy of all logits is held.
            size = max(1, LOGITS // logits.shape[-1])
            for part in live.nonzero().squeeze(-1).split(size):
                head = HeadTokens(
                    hidden.flatten(0, -2)[seen[part]].float() / temperature[part],
                    logits.detach().flatten(0, -2)[seen[part]].float() / temperature[part],
                    tokens[part],
                    advantages[part],
                )
                parts.append(head_fields.make(head, optimizer, self._settings))
            made = {name: torch.cat([one[name] for one in parts]) for name in head_fields.names}
            found = {}
            for name in head_fields.names:
                values = advantages.new_zeros(len(data["input_ids"].values()))
                values[place[live]] = made[name].float()
                found[name] = torch.nested.nested_tensor_from_jagged(values, offsets)
            sums = [made[name].sum().double() for name in head_fields.names]
            self._sums.append(torch.stack([*sums, mask.sum().double()]))
        return found

    def metrics(self, seconds: float, group: Any) -> dict[str, list[float]]:
        """What is logged of a mini-batch that took so many seconds on this rank."""
        assert self._loss.head_fields is not None  # noqa: S101 - for the type checker
        total = torch.stack(self._sums).sum(dim=0)
        torch.distributed.all_reduce(total, group=group)
        *sums, count = total.tolist()
        means = [value / max(count, 1.0) for value in sums]
        names = (f"actor/{name}" for name in self._loss.head_fields.names)
        return {name: [mean] for name, mean in zip(names, means, strict=True)} | {
            SECONDS: [self._seconds / seconds]
        }


def _finish_kernels() -> None:
    """Wait for the GPU, so that a clock tells how long its work took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def head_engine(parent: type) -> type:
    """Extend `FSDPEngineWithLMHead` by fields of the head."""

    class HeadEngine(parent):
        """verl's engine; where a loss reads the head, it makes the fields."""

        _watch: Watch | None = None

        def forward_backward_batch(
            self, data: Any, loss_function: Any, forward_only: bool = False
        ) -> Any:
            """Follow verl's interface; means of the fields appear in the metrics."""
            found = None if forward_only else loss_of(loss_function)
            if found is None or found[0].head_fields is None:
                return super().forward_backward_batch(data, loss_function, forward_only)
            watch = self._watch = Watch(*found)
            start = time.perf_counter()
            try:
                with watch.on(self.module, self.optimizer):
                    output = super().forward_backward_batch(data, loss_function, forward_only)
            finally:
                self._watch = None
            seconds = time.perf_counter() - start
            output["metrics"].update(watch.metrics(seconds, self.get_data_parallel_group()))
            return output

        def prepare_model_outputs(
            self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
        ) -> dict[str, Any]:
            """Follow verl's interface, with the fields among the outputs."""
            fields: dict[str, Any] = {}
            if self._watch is not None:
                packed = "temperature_rmpad" in output_args
                fields = self._watch.fields(output.logits, micro_batch, packed)
            made = super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
            return made | fields

    return HeadEngine
