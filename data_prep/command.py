"""What the commands share: arguments, errors, a progress bar, folders that appear whole."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress

from hpo_verl.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, DataError, HpoVerlError

# The environment variable by which `hpo-verl` asks for it.
ERRORS_ON_STDOUT = "HPO_VERL_ERRORS_ON_STDOUT"
ERROR = "error: "


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, `error: ...`, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with exit code 2."""
        _complain(f"{message} (see --help)")
        self.exit(EXIT_BAD_INPUT)

    @property
    def names(self) -> list[str]:
        """Its options as recipes name them, without those that no recipe gives."""
        options = [action.dest for action in self._actions if action.option_strings]
        return [name for name in options if name not in ("help", "out")]


def _complain(text: str) -> None:
    """Say an error; on stdout where another command reads it there, and says it itself."""
    stream = sys.stdout if os.environ.get(ERRORS_ON_STDOUT) else sys.stderr
    print(f"{ERROR}{text}", file=stream)


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)`, print an error of bad input as one line, and return the exit code."""
    try:
        main(argv)
    except HpoVerlError as error:
        _complain(str(error))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def integer_in(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse `type` that accepts an integer in [low, high]."""

    def parse(text: str) -> int:
        # No more digits than an integer of 64 bits has.
        if re.fullmatch(r"-?[0-9]{1,19}", text) and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")

    return parse


def commit(text: str) -> str:
    """An argparse `type` that accepts a full commit, which nobody can move as a branch or tag."""
    if not re.fullmatch(r"[0-9a-f]{40}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a commit (40 hexadecimal digits)")
    return text


def progress_bar() -> Progress:
    """Return a progress bar on stderr; without a terminal it prints its last state only."""
    return Progress(*Progress.get_default_columns(), console=Console(stderr=True))


def check_output(out: str | Path) -> None:
    """Raise DataError if files cannot be made under `out`: call before long work."""
    out = Path(out)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise DataError(f"{out}: {existing} is a file; a folder is needed")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DataError(f"{out}: no permission to write in {existing}")


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """Give a temporary folder in `parent`, which is made if missing, or raise DataError.

    The block writes there and then moves what is complete to its place. If the block fails, the
    folders that were made on the way to `parent` go too.
    """
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        with write_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=parent) as folder:
                yield Path(folder)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a DataError that names the path."""
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC or "No space left" in str(error)
        reason = "no space left on the disk" if full else first_line(error)
        raise DataError(f"{path}: cannot be written: {reason}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message: arrow's messages have many."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
