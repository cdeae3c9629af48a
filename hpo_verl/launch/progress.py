"""What a user sees while a run goes on, and how long it may show no progress."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpo_verl.runs.metrics import MetricsFile, has_validation

# Without a terminal, at least one line in this time.
LINE_SECONDS = 60.0
# Where this process itself was suspended, the time does not count against the run.
LONGEST_LOOK_SECONDS = 5.0


class NoProgress(RuntimeError):
    """A run shows no progress for longer than its user permits."""


class ProgressBound:
    """Raises where what is seen of a run stays the same for too long.

    Args:
        seconds: how long it may stay the same; None for any time.
        key: the setting, for the message.
    """

    def __init__(self, seconds: float | None, key: str) -> None:
        self.seconds = seconds
        self.key = key
        self._seen: tuple[object, ...] = ()
        self._unchanged = 0.0
        self._looked = time.monotonic()

    def check(self, doing: str, *others: object) -> None:
        """Look at what the run is doing, and whatever else changes when it goes on.

        Raises:
            NoProgress: nothing has changed for too long.
        """
        now = time.monotonic()
        self._unchanged += min(now - self._looked, LONGEST_LOOK_SECONDS)
        self._looked = now
        if (doing, *others) != self._seen:
            self._seen, self._unchanged = (doing, *others), 0.0
        if self.seconds is not None and self._unchanged > self.seconds:
            raise NoProgress(
                f"the run made no progress for {self.seconds:g} s while it was {doing!r}; "
                f"{self.key}={self.seconds:g} permits no more (null: any time)"
            )


class TrainingProgress:
    """A progress bar with success rate and alpha; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("checking", total=None, status="")
        self._started = self._printed = time.monotonic()
        self._stage = ""

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, config: DictConfig, metrics: MetricsFile, stage: str) -> None:
        """Show what is new in the metrics, and what the run is doing.

        Args:
            config: the composed recipe.
            metrics: of the run.
            stage: what the run is doing.
        """
        new, total = metrics.read_new(), config.trainer.total_training_steps
        for step, data in new:
            status = self._status(data, metrics)
            self._bar.update(self._task, completed=step, total=total, status=status)
            if step in (0, 1, total) or has_validation(data) or self._line_is_due():
                self._print(f"step {step}/{total or '?'}  {status}")
        if stage != self._stage:
            self._bar.update(self._task, description=stage)
        if (stage != self._stage and not metrics.rows) or self._line_is_due():
            self._print(stage)
        self._stage = stage

    def _line_is_due(self) -> bool:
        return time.monotonic() - self._printed > LINE_SECONDS

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"{text}  {self._printed - self._started:.0f} s", markup=False)

    def _status(self, data: Mapping[str, float], metrics: MetricsFile) -> str:
        parts = []
        _, success = metrics.success()
        if success:
            parts.append(f"held-out success {success[-1]:.1%}")
        if "hpo/solve_rate" in data:
            parts.append(f"batch {data['hpo/solve_rate']:.1%}")
        if "hpo/alpha" in data:
            parts.append(f"alpha {data['hpo/alpha']:.2f}")
        if "timing_s/step" in data:
            parts.append(f"{data['timing_s/step']:.1f} s/step")
        return "  ".join(parts)
