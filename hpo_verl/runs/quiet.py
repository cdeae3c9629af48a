"""Keeps what other packages print away from what the user asked for."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep verl's remarks on optional packages from the user's screen."""
    before = os.environ.get("VERL_LOGGING_LEVEL")
    os.environ["VERL_LOGGING_LEVEL"] = "ERROR"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ["VERL_LOGGING_LEVEL"]
        else:
            os.environ["VERL_LOGGING_LEVEL"] = before


@contextlib.contextmanager
def stdout_reserved() -> Iterator[None]:
    """Send everything written to stdout inside to stderr, children's and libraries' writes too."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
