"""What the guard of updates knows of one, and its settings; the guard: `guarded_engine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hpo_verl.core.settings import parse_settings, require_number
from hpo_verl.errors import ConfigError
from hpo_verl.installed import package_versions
from hpo_verl.verl_plugin.engine.recorded_batch import (
    COUNTS,
    MASK,
    TOKENS,
    RecordedBatch,
    Tensors,
    first_found,
    first_not_finite,
    loss_settings_of,
    loss_tensors,
    with_tokens,
)

SECTION = "trainer.guard"
NOT_FINITE = "actor/update_not_finite"
NO_ADVANTAGE = "actor/update_without_advantage"
COUNTERS = {
    NOT_FINITE: "hpo/updates_not_finite",
    NO_ADVANTAGE: "hpo/updates_without_advantage",
}
"""Share of a step's updates, as verl averages it -> their number, as it is logged."""

LossFunction = Callable[..., tuple[torch.Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class StepGuardSettings:
    """The section `trainer.guard`.

    Attributes:
        max_not_finite_in_a_row: number of updates (mini-batches) in a row that are not finite, at
            least 1; the last of them ends the run.
        max_seconds_without_progress: above 0; where no stage of the run ends for so long, the
            launcher ends it. None for any time.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    max_not_finite_in_a_row: int = 3
    max_seconds_without_progress: float | None = None

    def __post_init__(self) -> None:
        key, value = f"{SECTION}.max_not_finite_in_a_row", self.max_not_finite_in_a_row
        require_number(key, value, 1)
        if not isinstance(value, int):
            raise ConfigError(f"{key} = {value!r}: must be an integer")
        if self.max_seconds_without_progress is not None:
            key = f"{SECTION}.max_seconds_without_progress"
            require_number(key, self.max_seconds_without_progress, 1)


def step_guard_settings(config: Mapping[str, Any]) -> StepGuardSettings:
    """Read `trainer.guard` of verl's whole configuration.

    Raises:
        ConfigError: names the setting, its value and what is permitted.
    """
    return parse_settings(StepGuardSettings, config["trainer"].get("guard", None), SECTION)


@dataclass(frozen=True)
class GuardedLoss:
    """A loss function for verl's workers that tells our engine to guard its updates.

    Any other engine calls it like the function itself.

    Attributes:
        function: verl's `ppo_loss` or ours, with the actor config bound by `partial`.
        settings: of the guard.
        folder: where mini-batches that are not finite are kept.
    """

    function: partial[tuple[torch.Tensor, dict[str, Any]]]
    settings: StepGuardSettings
    folder: Path

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Call the function."""
        return self.function(*args, **kwargs)


@dataclass
class Update:
    """What is known of the update at hand.

    Attributes:
        found: Text on the first tensor that is not finite.
        in_backward: Whether only the model's backward pass shows it.
        micro_batches: What the loss read, and the token ids.
        losses: Of the micro-batches that were evaluated.
        settings: Those of the loss.
        counts: verl's counts of the global mini-batch.
    """

    found: str | None = None
    in_backward: bool = False
    micro_batches: list[tuple[Tensors, Tensors]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def evaluate(
        self,
        model_output: dict[str, Any],
        data: Any,
        dp_group: Any = None,
        *,
        function: LossFunction,
        config: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Evaluate a loss, unless what it reads is not finite.

        Args:
            model_output: As verl passes it.
            data: As verl passes it.
            dp_group: As verl passes it.
            function: The loss function.
            config: verl's actor config.

        Returns:
            Loss and metrics; a loss of 0 and no metrics where an input is not finite.
        """
        tensors = loss_tensors(model_output, data)
        index = len(self.micro_batches)
        # Not all of it: images would stay on the device until the update.
        self.micro_batches.append((tensors, {name: data[name] for name in TOKENS if name in data}))
        self.counts = {key: data[key] for key in COUNTS}
        self.settings = loss_settings_of(config)
        text = first_not_finite(tensors)
        if text is None:
            loss, metrics = function(model_output=model_output, data=data, dp_group=dp_group)
            self.losses.append(loss.detach())
            return loss, metrics
        self.found = self.found or f"micro-batch {index}: {text}"
        log_probs = model_output["log_probs"]
        values = log_probs.values() if log_probs.is_nested else log_probs
        # The backward pass is still made: in it FSDP's ranks wait for one another.
        return values.nan_to_num(0.0, 0.0, 0.0).sum() * 0.0, {}

    def has_advantage(self) -> bool:
        """Whether a live advantage of this rank is not 0."""
        return any(
            bool(((tensors["advantages"] != 0) & tensors[MASK]).any())
            for tensors, _ in self.micro_batches
        )

    def loss_is_finite(self) -> bool:
        """Whether the losses of all micro-batches that were evaluated are finite."""
        return not self.losses or bool(torch.isfinite(torch.stack(self.losses)).all())

    def find(self, module: torch.nn.Module) -> None:
        """Name what is not finite although all that the loss reads is."""
        try:
            self.found = first_found(self.recorded())
        except Exception as error:
            # Losses of others may need more than is recorded.
            print(f"WARN: the loss could not be evaluated again: {error}", flush=True)
        if self.found is None:
            self.found, self.in_backward = bad_gradients(module), True

    def recorded(self) -> RecordedBatch:
        """The mini-batch with what is needed to evaluate it again."""
        facts = {"counts": self.counts, "versions": package_versions(), "found": ""}
        info = {**self.settings, **facts}
        return RecordedBatch(info, [with_tokens(*pair) for pair in self.micro_batches])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(module: torch.nn.Module) -> float:
    """Norm of this rank's part of the gradient; 0 without one."""
    gradients = [_local(p.grad) for p in module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def bad_gradients(module: torch.nn.Module) -> str:
    """Name the first parameter whose gradient is not finite on this rank, and how many are so."""
    gradients = {n: _local(p.grad) for n, p in module.named_parameters() if p.grad is not None}
    bad = {n: int((~torch.isfinite(g)).sum()) for n, g in gradients.items()}
    names = [name for name, count in bad.items() if count]
    if not names:
        return "gradient: finite, but its norm is not"
    first = names[0]
    return (
        f"gradient of {first}: {bad[first]} of {gradients[first].numel()} values are not finite; "
        f"so in {len(names)} of {len(gradients)} parameters, the last {names[-1]}"
    )


def pop_counts(metrics: dict[str, Any], updates: int) -> dict[str, int]:
    """Take the shares out of a step's metrics and turn them into numbers of updates.

    Args:
        metrics: Metrics of the actor's update; the shares are removed from it.
        updates: Number of updates (mini-batches) of the step.

    Returns:
        Empty if the update brought no shares.
    """
    return {
        shown: round(float(metrics.pop(name)) * updates)
        for name, shown in COUNTERS.items()
        if name in metrics
    }
