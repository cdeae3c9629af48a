"""Files that are there whole or not at all, the digest that tells, and a lock on a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from hpo_verl.errors import EnvironmentCheckError

LOCK_NAME = ".lock"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Reading so much takes longer than a tick of the file system's clock, so that a later change
# shows in the file's times.
READ_ONCE_BYTES = 64 << 20
_known: dict[tuple[int, ...], str] = {}


def sha256_once(path: Path) -> str:
    """SHA-256 of a file's content; a large file is read once per process while it is unchanged.

    A file counts as unchanged while its inode, size and times stay the same. Programs cannot
    set the time of the inode's last change.
    """
    before = _state(path)
    if before in _known:
        return _known[before]
    digest = file_sha256(path)
    if before == _state(path):
        remember_sha256(path, digest)
    return digest


def remember_sha256(path: Path, digest: str) -> None:
    """Keep the digest of a large file that another process of this start has just computed."""
    if path.stat().st_size >= READ_ONCE_BYTES:
        _known[_state(path)] = digest


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Raises:
        OSError: the disk is full or broken; a write that was delayed may fail only here.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, even if the machine stops.

    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    # With another suffix: a search for such files must not find what a kill left.
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def locked(
    folder: Path, remedy: str = "choose another with hydra.run.dir=", *, wait: bool = False
) -> Iterator[None]:
    """Hold the lock of a folder, made if missing; the system releases it when this process ends.

    With `wait`, until another process has released it; `remedy` is what to do otherwise.

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
