"""A lock on a run folder, so that two runs never write to the same one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from hpo_verl.errors import EnvironmentCheckError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(
    folder: Path, remedy: str = "choose another with hydra.run.dir=", *, wait: bool = False
) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when this process ends.

    Args:
        folder: made if missing.
        remedy: what to do where another process holds it, for the message.
        wait: until another process has released it.

    Raises:
        EnvironmentCheckError: another process holds it, the file system keeps no locks, or the
            folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK_NAME).open("a+")
    except OSError as error:
        raise EnvironmentCheckError(f"run folder {folder}: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise EnvironmentCheckError(
                f"run folder {folder}: another run is using it; {remedy}"
            ) from error
        except OSError as error:
            reason = f"{errno.errorcode.get(error.errno or 0)}: {error.strerror}"
            raise EnvironmentCheckError(
                f"run folder {folder}: its file system keeps no locks ({reason}); {remedy} on a "
                "local disk, or mount this one with locks (Lustre: option flock; NFS: lock service)"
            ) from error
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield
