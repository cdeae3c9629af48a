"""What a user sees while a run goes on: one bar, or one line every few steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpo_verl.launch.metrics import MetricsFile

# Without a terminal, one line for so many steps.
STEPS_PER_LINE = 10


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
        self._task = self._bar.add_task("starting verl and Ray", total=None, status="")
        self._started = time.monotonic()

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

    def update(self, config: DictConfig, metrics: MetricsFile) -> None:
        """Show what is new in the metrics."""
        for step, data in metrics.read_new():
            total = config.trainer.total_training_steps
            status = self._status(data, metrics)
            self._bar.update(
                self._task, description="training", completed=step, total=total, status=status
            )
            shown = step in (0, 1, total) or step % STEPS_PER_LINE == 0
            if not self.console.is_terminal and shown:
                seconds = time.monotonic() - self._started
                self.console.print(f"step {step}/{total or '?'}  {status}  {seconds:.0f} s")

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
