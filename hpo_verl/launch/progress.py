"""What a user sees while a run goes on, and how long it may show no progress."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from hpo_verl.runs.metrics import MetricsFile, has_validation, measured
from hpo_verl.runs.samples import samples_file

# At least one line in this time.
LINE_SECONDS = 60.0
# Where this process itself was suspended, the time does not count against the run.
LONGEST_LOOK_SECONDS = 5.0


class NoProgress(RuntimeError):
    """A run shows no progress for longer than its user permits."""


class ProgressBound:
    """Raises where what is seen of a run stays the same for more than `seconds` (None: any time).

    `key` is the setting, for the message.
    """

    def __init__(self, seconds: float | None, key: str) -> None:
        self.seconds = seconds
        self.key = key
        self._seen: tuple[object, ...] = ()
        self._unchanged = 0.0
        self._looked = time.monotonic()

    def check(self, *seen: object) -> None:
        """Compare what the run is doing, and its other signs of progress, with the last call's."""
        now = time.monotonic()
        self._unchanged += min(now - self._looked, LONGEST_LOOK_SECONDS)
        self._looked = now
        if seen != self._seen:
            self._seen, self._unchanged = seen, 0.0
        if self.seconds is not None and self._unchanged > self.seconds:
            raise NoProgress(
                f"the run made no progress for {self.seconds:g} s while it was {seen[0]!r}; "
                f"{self.key}={self.seconds:g} permits no more (null: any time)"
            )


class TrainingProgress(Status):
    """A line for each validation and each minute; on a terminal also what the run is doing.

    With `samples`, also some responses of each validation.
    """

    def __init__(self, console: Console, samples: bool = False) -> None:
        super().__init__("checking", console=console)
        self._samples = samples
        self._started = self._printed = time.monotonic()
        self._stage = ""

    def show(self, config: DictConfig, metrics: MetricsFile, stage: str) -> None:
        """Show what is new in the metrics, and what the run is doing."""
        new, total = metrics.read_new(), config.trainer.total_training_steps
        for step, data in new:
            if step in (0, 1, total) or has_validation(data) or self._line_is_due():
                self._print(f"step {step}/{total or '?'}  {_summary(data, metrics)}")
            if self._samples and has_validation(data):
                self._print_samples(samples_file(metrics.path.parent, step))
        if (stage != self._stage and not metrics.rows) or self._line_is_due():
            self._print(stage)
        if stage != self._stage:
            self._stage = stage
            self.update(escape(stage))

    def _line_is_due(self) -> bool:
        return time.monotonic() - self._printed > LINE_SECONDS

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        self.console.print(f"{text}  {self._printed - self._started:.0f} s", markup=False)

    def _print_samples(self, file: Path) -> None:
        if not file.is_file():
            return
        # A terminal may know fewer letters than a model.
        encoding = self.console.encoding
        text = file.read_bytes().decode().encode(encoding, "backslashreplace").decode(encoding)
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _summary(data: Mapping[str, float], metrics: MetricsFile) -> str:
    parts = []
    _, success = metrics.success()
    if success:
        parts.append(f"held-out success{measured(metrics.sources())} {success[-1]:.1%}")
    if "hpo/solve_rate" in data:
        parts.append(f"batch {data['hpo/solve_rate']:.1%}")
    if "hpo/alpha" in data:
        parts.append(f"alpha {data['hpo/alpha']:.2f}")
    if "timing_s/step" in data:
        parts.append(f"{data['timing_s/step']:.1f} s/step")
    return "  ".join(parts)
