"""What the commands of `data_prep` share: one-line errors and a progress bar."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress

from hpo_verl.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, HpoVerlError


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, `error: ...`, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with exit code 2."""
        self.exit(EXIT_BAD_INPUT, f"error: {message} (see --help)\n")


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)`, print an error of bad input as one line, and return the exit code."""
    try:
        main(argv)
    except HpoVerlError as error:
        print(f"error: {error}", file=sys.stderr)
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
