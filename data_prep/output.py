"""Write files so that all of them appear, or none."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hpo_verl.errors import DataError


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
