"""Updates that must not happen: NaN or infinity, and nothing to learn from.

`guarded_engine` extends verl's engine. Before the optimizer's step of each
mini-batch, all ranks agree on one of three outcomes:

- Not finite: an input of the loss, the log-probabilities, the loss or a gradient
  holds NaN or infinity on some rank. There is no optimizer step: weights and
  optimizer state stay bit for bit. The first such tensor is named, the
  mini-batch kept for `hpo-verl replay`, and the metrics of this mini-batch are
  left out of the step's (its loss counts as 0). After `max_not_finite_in_a_row`
  of them the run ends; an update that is finite starts the count anew.
- No advantage: every live advantage on every rank is 0, and so is every
  gradient. No step either, since Adam's momentum and weight decay would still
  move the weights. With an entropy or KL term the gradient is not 0, and the
  step is made.
- Otherwise verl's step. (verl itself skips where the norm of the gradient is not
  finite, and says so in a line of its log.)

The learning rate follows verl's training steps, whatever was skipped.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from hpo_verl.errors import NotFiniteError
from hpo_verl.verl_plugin.engine.batch_file import save
from hpo_verl.verl_plugin.engine.step_guard import (
    COUNTERS,
    NO_ADVANTAGE,
    NOT_FINITE,
    SECTION,
    GuardedLoss,
    Update,
    gradient_norm,
)

FILES_KEPT = 20


def guarded_engine(parent: type) -> type:
    """Extend an engine of verl by the guard.

    Args:
        parent: `FSDPEngineWithLMHead`, or a class made of it.
    """
    from verl.utils.device import get_device_id

    class GuardedEngine(parent):
        """verl's engine; makes no update that is not finite, or has no advantage."""

        _update: Update | None = None
        _outcome: str | None = None
        _in_a_row = 0
        _not_finite = 0

        def train_batch(self, data: Any, loss_function: Any) -> Any:
            """Follow verl's interface; guards the update of a `GuardedLoss`.

            Raises:
                NotFiniteError: The last of too many updates in a row that were not finite.
            """
            if not isinstance(loss_function, GuardedLoss):
                return super().train_batch(data, loss_function)
            self._update, self._outcome = Update(), None
            inner = loss_function.function
            config = inner.keywords["config"]
            watched = partial(self._update.evaluate, function=inner, config=config)
            try:
                output = super().train_batch(data, watched)
                if self._outcome == NOT_FINITE:
                    self._in_a_row += 1
                    self._not_finite += 1
                    self._report(loss_function)
                    output["metrics"], output["loss"] = {}, [0.0]
                else:
                    self._in_a_row = 0
            finally:
                self._update = None
            for name in COUNTERS:
                output["metrics"][name] = [float(self._outcome == name)]
            return output

        def optimizer_step(self) -> float:
            """Make verl's step if all ranks find the update finite and worth it.

            Returns:
                verl's norm of the gradient; NaN or 0 where there was no step.
            """
            update = self._update
            if update is None:
                return super().optimizer_step()
            norm = gradient_norm(self.module)
            # With a scaler (float16) such gradients are part of its search for a scale.
            scaled = getattr(self, "scaler", None) is not None
            bad_gradient = not scaled and not math.isfinite(norm)
            bad = update.found is not None or bad_gradient or not update.loss_is_finite()
            learns = norm != 0 or update.has_advantage()
            flags = torch.tensor([bad, learns], dtype=torch.int32).to(get_device_id())
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            any_bad, any_learns = flags.tolist()
            if any_bad:
                if bad and update.found is None:
                    update.find(self.module)
                self.optimizer_zero_grad()
                self._outcome = NOT_FINITE
                return math.nan
            if not any_learns:
                self.optimizer_zero_grad()
                self._outcome = NO_ADVANTAGE
                return 0.0
            total = super().optimizer_step()
            if not scaled and not math.isfinite(total):
                # verl has made no step either.
                update.found = "gradient: finite on each rank, but the norm over all is not"
                update.in_backward = True
                self._outcome = NOT_FINITE
            return total

        def _report(self, loss: GuardedLoss) -> None:
            """Tell what was not finite, keep the mini-batch, and end a run of too many."""
            update = self._update
            assert update is not None  # noqa: S101
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
            seen: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(seen, (update.in_backward, update.found))
            # A rank that finds it in the backward pass alone may have it from another one.
            _, source = min((late, r) for r, (late, text) in enumerate(seen) if text is not None)
            found = seen[source][1] + (f" (rank {source} of {ranks})" if ranks > 1 else "")
            path = loss.folder / f"not_finite_{self._not_finite:04d}_rank{source}.safetensors"
            last = self._in_a_row >= loss.settings.max_not_finite_in_a_row
            kept = last or self._not_finite <= FILES_KEPT
            if rank == source and kept:
                batch = update.recorded()
                batch.info["found"] = found
                try:
                    save(path, batch)
                except OSError as error:
                    print(f"WARN: {path} could not be written: {error}", flush=True)
            text = f"{found}; mini-batch: {path if kept else 'not kept'}"
            if rank == source:
                print(f"WARN: update {self._in_a_row} in a row not finite: {text}", flush=True)
            if last:
                raise NotFiniteError(
                    f"{self._in_a_row} updates in a row were not finite ({SECTION}."
                    f"max_not_finite_in_a_row), the last: {text}; see hpo-verl replay"
                )

    return GuardedEngine
