"""What the launcher and the trainer, which may run on another machine, tell each other.

Two files in the run's folder, made by the launcher; a trainer without a launcher writes
neither. `.stop`: the trainer writes that it listens when it begins to train; the launcher
writes the request, and the trainer, before it ends early, what it did. `.stage`: what the
trainer is doing. The launcher makes the files before the run and only their content changes,
since network file systems show new content at once, but a new file only after a while.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

LISTENING, REQUESTED, STOPPED = "listening", "stop", "stopped"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Message:
    """A small text file in a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the file, empty."""
        self.path.write_text("")

    def read(self) -> str | None:
        """The text that was written last; None where there is no file."""
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None

    def write(self, text: str) -> None:
        """Write to an existing file; without a file there is no reader."""
        if self.path.exists():
            self.path.write_text(text)

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def stop_message(folder: Path) -> Message:
    """The request to stop, and the answer, of the run in a folder."""
    return Message(folder / ".stop")


def stage_message(folder: Path) -> Message:
    """What the trainer of the run in a folder is doing."""
    return Message(folder / ".stage")


class GracefulStop:
    """The first Ctrl-C or SIGTERM asks the trainer to stop; the next one interrupts.

    A context manager. The first one interrupts too where the trainer does not listen: it has
    not begun to train, or is not ours. At the end `file` is removed, and `stopped` says whether
    the trainer ended early because it was asked.
    """

    def __init__(
        self,
        file: Message,
        announce: Callable[[str], None],
        signals: Sequence[signal.Signals] = SIGNALS,
    ) -> None:
        self.file = file
        self.signals = signals
        self.asked = self.stopped = self._announced = False
        self._announce = announce
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        self.file.create()
        for number in self.signals:
            # A shell lets a job in the background ignore the terminal's Ctrl-C.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self.stopped = self.file.read() == STOPPED
        self.file.remove()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self.file.read() != LISTENING:
            raise KeyboardInterrupt
        self.asked = True
        self.file.write(REQUESTED)

    def on_poll(self) -> None:
        """Announce the request; a signal's handler must not print."""
        if self.asked and not self._announced:
            self._announced = True
            self._announce("stopping after this step, with a checkpoint; Ctrl-C again: at once")
