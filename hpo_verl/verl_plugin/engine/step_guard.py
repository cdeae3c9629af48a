"""Updates that must not happen: NaN or infinity, and nothing to learn from.

Before the optimizer's step of each mini-batch, all ranks agree on one of three outcomes:

- Not finite: an input of the loss, the log-probabilities, the loss or a gradient holds NaN or
  infinity on some rank. There is no step: weights and optimizer state stay bit for bit. The first
  such tensor is named, the mini-batch kept for `hpo-verl replay`, and its metrics are left out of
  the step's (its loss counts as 0). After `max_not_finite_in_a_row` of them the run ends; an
  update that is finite starts the count anew.
- No advantage: every live advantage and every gradient on every rank is 0. No step either, since
  Adam's momentum and weight decay would still move the weights; with `skip_without_advantage=false`
  the step is made and counted. With an entropy or KL term the gradient is not 0: an update.
- Otherwise verl's step. (verl itself skips where the norm of the gradient is not finite, and says
  so in a line of its log.)

The learning rate follows verl's training steps, whatever was skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hpo_verl.core.settings import parse_settings, require_flag, require_integer, require_number
from hpo_verl.errors import NotFiniteError
from hpo_verl.installed import package_versions
from hpo_verl.verl_plugin.engine.replay import (
    COUNTS,
    MASK,
    Tensors,
    first_found,
    first_not_finite,
    loss_settings_of,
    loss_tensors,
    save,
)

SECTION = "trainer.guard"
NOT_FINITE = "actor/update_not_finite"
NO_ADVANTAGE = "actor/update_without_advantage"
COUNTERS = {
    NOT_FINITE: "hpo/updates_not_finite",
    NO_ADVANTAGE: "hpo/updates_without_advantage",
}
"""Share of a step's updates, as verl averages it -> their number, as it is logged."""
FILES_KEPT = 20


@dataclass(frozen=True)
class StepGuardSettings:
    """The section `trainer.guard`.

    Attributes:
        max_not_finite_in_a_row: number of updates (mini-batches) in a row that are not finite, at
            least 1; the last of them ends the run.
        skip_without_advantage: whether an update in which every advantage is 0 is left out; verl
            makes it.
        max_seconds_without_progress: at least 1; where no stage of the run ends for so long, the
            launcher ends it. None for any time.
    """

    max_not_finite_in_a_row: int = 3
    skip_without_advantage: bool = True
    max_seconds_without_progress: float | None = None

    def __post_init__(self) -> None:
        require_integer(f"{SECTION}.max_not_finite_in_a_row", self.max_not_finite_in_a_row, 1)
        require_flag(f"{SECTION}.skip_without_advantage", self.skip_without_advantage)
        if self.max_seconds_without_progress is not None:
            key = f"{SECTION}.max_seconds_without_progress"
            require_number(key, self.max_seconds_without_progress, 1)


def step_guard_settings(config: Mapping[str, Any]) -> StepGuardSettings:
    """Read `trainer.guard` of verl's whole configuration; a bad one raises a ConfigError."""
    return parse_settings(StepGuardSettings, config["trainer"].get("guard", None), SECTION)


@dataclass(frozen=True)
class GuardedLoss:
    """A loss function for verl's workers that tells our engine to guard its updates.

    The function is verl's `ppo_loss` or ours, with the actor config bound by `partial`; any other
    engine calls it as it is. The folder is where mini-batches that are not finite are kept.
    """

    function: partial[tuple[torch.Tensor, dict[str, Any]]]
    settings: StepGuardSettings
    folder: Path

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Call the function."""
        return self.function(*args, **kwargs)


@dataclass
class Update:
    """What is known of one update on this rank.

    Attributes:
        outcome: `NOT_FINITE` or `NO_ADVANTAGE`; None for any other.
        skips: Whether there is no step without an advantage.
        found: Text on the first tensor that is not finite.
        in_backward: Whether only the model's backward pass shows it.
        micro_batches: What the loss read.
        losses: Of the micro-batches that were evaluated.
        info: Settings of the loss, and verl's counts of the global mini-batch.
    """

    outcome: str | None = None
    skips: bool = True
    found: str | None = None
    in_backward: bool = False
    micro_batches: list[Tensors] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def evaluate(
        self,
        function: Callable[..., tuple[torch.Tensor, dict[str, Any]]],
        model_output: dict[str, Any],
        data: Any,
        dp_group: Any = None,
        *,
        config: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Evaluate a loss function of verl; 0 without metrics where an input is not finite."""
        tensors = loss_tensors(model_output, data)
        index = len(self.micro_batches)
        self.micro_batches.append(tensors)
        if not self.info:
            self.info = {**loss_settings_of(config), "counts": {key: data[key] for key in COUNTS}}
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

    def find(self, module: torch.nn.Module) -> None:
        """Name what is not finite although all that the loss reads is."""
        try:
            self.found = first_found(self.recorded())
        except Exception as error:
            # Losses of others may need more than is recorded.
            print(f"WARN: the loss could not be evaluated again: {error}", flush=True)
        if self.found is None:
            self.found, self.in_backward = bad_gradients(module), True

    def recorded(self) -> dict[str, Any]:
        """The mini-batch as `replay` saves and evaluates it."""
        return {
            **self.info,
            "versions": package_versions(),
            "found": self.found or "",
            # Copies, since a view would bring all of its storage.
            "micro_batches": [
                {name: tensor.cpu().clone() for name, tensor in one.items()}
                for one in self.micro_batches
            ],
        }


def guarded_engine(parent: type) -> type:
    """Extend `FSDPEngineWithLMHead`, or a class made of it, by the guard."""
    from verl.utils.device import get_device_id

    class GuardedEngine(parent):
        """verl's engine; makes no update that is not finite, or has no advantage."""

        _update: Update | None = None
        _in_a_row = 0
        _not_finite = 0

        def train_batch(self, data: Any, loss_function: Any) -> Any:
            """Follow verl's interface; guards the update of a `GuardedLoss`.

            Too many in a row that are not finite raise a NotFiniteError.
            """
            if not isinstance(loss_function, GuardedLoss):
                return super().train_batch(data, loss_function)
            update = self._update = Update(skips=loss_function.settings.skip_without_advantage)
            # The parent reads the config from the `partial`, too.
            inner = loss_function.function
            watched = partial(update.evaluate, inner, config=inner.keywords["config"])
            try:
                output = super().train_batch(data, watched)
            finally:
                self._update = None
            if update.outcome == NOT_FINITE:
                self._in_a_row += 1
                self._not_finite += 1
                self._report(update, loss_function)
                output["metrics"], output["loss"] = {}, [0.0]
            else:
                self._in_a_row = 0
            for name in COUNTERS:
                output["metrics"][name] = [float(update.outcome == name)]
            return output

        def optimizer_step(self) -> float:
            """Make verl's step if all ranks find the update finite and worth it.

            Returns verl's norm of the gradient; NaN or 0 where there was no step.
            """
            update = self._update
            if update is None:
                return super().optimizer_step()
            norm = gradient_norm(self.module)
            # With a scaler (float16) such gradients are part of its search for a scale.
            scaled = getattr(self, "scaler", None) is not None
            bad_gradient = not scaled and not math.isfinite(norm)
            losses = torch.stack(update.losses) if update.losses else torch.zeros(1)
            bad_loss = not bool(torch.isfinite(losses).all())
            bad = update.found is not None or bad_gradient or bad_loss
            learns = norm != 0 or any(
                bool((one["advantages"] != 0)[one[MASK]].any()) for one in update.micro_batches
            )
            flags = torch.tensor([bad, learns], dtype=torch.int32).to(get_device_id())
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            any_bad, any_learns = flags.tolist()
            if any_bad or not any_learns:
                update.outcome = NOT_FINITE if any_bad else NO_ADVANTAGE
            if any_bad or (update.outcome and update.skips):
                if bad and update.found is None:
                    update.find(self.module)
                self.optimizer_zero_grad()
                return math.nan if any_bad else 0.0
            total = super().optimizer_step()
            if not scaled and not math.isfinite(total):
                # verl has made no step either.
                update.found = "gradient: finite on each rank, but the norm over all is not"
                update.in_backward = True
                update.outcome = NOT_FINITE
            return total

        def _report(self, update: Update, loss: GuardedLoss) -> None:
            """Tell what was not finite, keep the mini-batch, and end a run of too many."""
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
            seen: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(seen, (update.in_backward, update.found))
            # A rank that finds it in the backward pass alone may have it from another one.
            _, source = min((late, r) for r, (late, text) in enumerate(seen) if text is not None)
            found = seen[source][1] + (f" (rank {source} of {ranks})" if ranks > 1 else "")
            path = loss.folder / f"not_finite_{self._not_finite:04d}_rank{source}.pt"
            last = self._in_a_row >= loss.settings.max_not_finite_in_a_row
            kept = last or self._not_finite <= FILES_KEPT
            text = f"{found}; mini-batch: {path if kept else 'not kept'}"
            if rank == source:
                if kept:
                    update.found = found
                    try:
                        save(path, update.recorded())
                    except (OSError, RuntimeError) as error:
                        # torch's writer raises the latter where the disk is full.
                        print(f"WARN: {path} could not be written: {error}", flush=True)
                print(f"WARN: update {self._in_a_row} in a row not finite: {text}", flush=True)
            if last:
                raise NotFiniteError(
                    f"{self._in_a_row} updates in a row were not finite ({SECTION}."
                    f"max_not_finite_in_a_row), the last: {text}; see hpo-verl replay"
                )

    return GuardedEngine


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
    """Take the shares out of a step's metrics, as numbers of its updates (mini-batches)."""
    return {
        shown: round(float(metrics.pop(name)) * updates)
        for name, shown in COUNTERS.items()
        if name in metrics
    }
