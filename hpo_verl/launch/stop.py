"""How the launcher asks a trainer, which may run on another machine, to stop after its step.

One file in the run's folder, `.stop`: the trainer makes it when it begins to train, and
so says that it listens; the launcher writes the request into it, and the trainer, before
it ends early, what it did. It is the file's content that changes, since network file
systems show a new content to whoever opens a file, but a new file only after a while.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType

LISTENING, REQUESTED, STOPPED = "", "stop", "stopped"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFile:
    """The file `.stop` of a run.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".stop"

    def read(self) -> str | None:
        """What the other side wrote last; None where the trainer does not listen."""
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None

    def write(self, text: str) -> None:
        """Tell the other side."""
        self.path.write_text(text)

    def remove(self) -> None:
        """Forget what was asked."""
        self.path.unlink(missing_ok=True)


class GracefulStop:
    """The first Ctrl-C or SIGTERM asks the trainer to stop; the next one interrupts.

    A context manager. Where the trainer does not listen, since it has not begun to train
    or is not ours, the first one interrupts.

    Args:
        file: how the trainer is asked; removed at the end.
        announce: told, once, that it was asked.
        signals: which ones to heed.

    Attributes:
        stopped: at the end, whether the trainer ended early because it was asked.
    """

    def __init__(
        self,
        file: StopFile,
        announce: Callable[[str], None],
        signals: Sequence[signal.Signals] = SIGNALS,
    ) -> None:
        self.file = file
        self.signals = signals
        self.asked = False
        self.stopped = False
        self._announce = announce
        self._announced = False
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> GracefulStop:
        self.file.remove()
        for number in self.signals:
            # A shell lets a job in the background ignore the terminal's Ctrl-C.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self.stopped = self.file.read() == STOPPED
        self.file.remove()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self.file.read() is None:
            raise KeyboardInterrupt
        self.asked = True
        self.file.write(REQUESTED)

    def on_poll(self) -> None:
        """Say what happens; a signal's handler must not print."""
        if self.asked and not self._announced:
            self._announced = True
            self._announce("stopping after this step, with a checkpoint; Ctrl-C again: at once")
