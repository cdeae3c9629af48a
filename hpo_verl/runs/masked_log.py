"""The log file of a run's processes, without the secrets that they print.

verl prints its whole configuration, and libraries print what they were given. So
the processes write into a pipe; a thread here masks each line and writes it to
the file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

LINE_BYTES = 1 << 20
BLOCK_BYTES = 1 << 16
JOIN_SECONDS = 10.0


class MaskedLog:
    """A pipe to a log file; until it is started, the pipe holds what was written.

    Args:
        mask: Called with whole lines; returns what may be written.
    """

    def __init__(self, mask: Callable[[str], str]) -> None:
        self._mask = mask
        self._reading, self._writing = os.pipe()
        self._thread: threading.Thread | None = None

    def fileno(self) -> int:
        """File descriptor for the processes' output."""
        return self._writing

    def close_writing(self) -> None:
        """Leave the writing to the process that has inherited the pipe."""
        os.close(self._writing)

    def start(self, path: Path) -> None:
        """Begin to copy to a file, which is made anew."""
        arguments = (path.open("wb"),)
        self._thread = threading.Thread(
            target=self._copy, args=arguments, name="masked log", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Wait until no process writes any more, and all is in the file."""
        if self._thread is None:
            os.close(self._reading)
        else:
            self._thread.join(JOIN_SECONDS)

    def _copy(self, stream: BinaryIO) -> None:
        rest = b""
        with stream as file, open(self._reading, "rb", buffering=0) as pipe:
            while block := pipe.read(BLOCK_BYTES):
                rest += block
                # Whole lines, so that no secret is cut in two.
                end = rest.rfind(b"\n") + 1 or (len(rest) if len(rest) > LINE_BYTES else 0)
                self._write(file, rest[:end])
                rest = rest[end:]
            self._write(file, rest)

    def _write(self, file: BinaryIO, block: bytes) -> None:
        text = block.decode(errors="surrogateescape")
        file.write(self._mask(text).encode(errors="surrogateescape"))
        file.flush()
