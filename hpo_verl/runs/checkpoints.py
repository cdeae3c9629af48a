"""Which checkpoints are whole: a seal of checksums, written last, and the choice by it.

verl writes a checkpoint's files and then `latest_checkpointed_iteration.txt`, none of them
atomically. The seal `global_step_N/complete.json` names every file with size and SHA-256. It is
written last and atomically, after the files and the metrics of step N are on the disk. Only
checkpoints whose seal holds are used.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hpo_verl.errors import DataError
from hpo_verl.runs.files import file_sha256, sync, write_atomically

FOLDER_NAME = "checkpoints"
"""Of a run folder, unless the configuration names another place."""
SEAL = "complete.json"
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's own note of the last step; it may be torn, so nothing here relies on it."""
DATA_ORDER, ACTOR = "data.pt", "actor"
STEP_FOLDER = re.compile(r"global_step_(0|[1-9][0-9]{0,17})")
RANK_FILE = re.compile(r"(?P<kind>\w+)_world_size_(?P<ranks>\d+)_rank_(?P<rank>\d+)\.pt")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROBE_BYTES = 1 << 20
HASHING_THREADS = 8


@dataclass(frozen=True)
class Chosen:
    """The checkpoint that a run continues from; `left_out` says what is wrong with newer ones."""

    path: Path
    step: int
    left_out: tuple[str, ...]


def step_of(path: Path) -> int | None:
    """Step of a folder named `global_step_N`; None for another name."""
    found = STEP_FOLDER.fullmatch(path.name)
    return int(found[1]) if found else None


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint in a folder, whole or not, newest first."""
    if not folder.is_dir():
        return []
    found = ((step_of(path), path) for path in folder.iterdir() if path.is_dir())
    return sorted(((step, path) for step, path in found if step is not None), reverse=True)


def holds_checkpoints(folder: Path) -> bool:
    """Whether anything of a checkpoint, whole or not, is in a folder."""
    return (folder / TRACKER).exists() or bool(step_folders(folder))


def _names(checkpoint: Path) -> list[str]:
    """Everything below a checkpoint that is no folder, but for the seal and hidden files.

    Nothing loads hidden files (`.nfs*`, a partial seal).
    """
    return sorted(
        str(path.relative_to(checkpoint))
        for path in checkpoint.rglob("*")
        if path.is_symlink() or not path.is_dir()
        if path.name != SEAL and not path.name.startswith(".")
    )


def _digests(checkpoint: Path, names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        found = pool.map(lambda name: file_sha256(checkpoint / name), names)
        return dict(zip(names, found, strict=True))


def _absent(names: list[str]) -> str | None:
    """The first file without which no run can continue: the data order, or one of a rank."""
    if DATA_ORDER not in names:
        return DATA_ORDER
    for name in names:
        if found := RANK_FILE.fullmatch(Path(name).name):
            kind, ranks = found["kind"], int(found["ranks"])
            for rank in range(ranks):
                other = str(Path(name).with_name(f"{kind}_world_size_{ranks}_rank_{rank}.pt"))
                if other not in names:
                    return other
    return None if any(name.startswith(f"{ACTOR}/") for name in names) else f"file in {ACTOR}"


def seal(checkpoint: Path) -> None:
    """Write `complete.json`, once all files of the checkpoint are on the disk.

    Raises:
        DataError: a file is missing without which no run can continue.
        OSError: a file could not be read, or the disk is full.
    """
    names = _names(checkpoint)
    if absent := _absent(names):
        raise DataError(
            f"{checkpoint} holds no {absent} after it was saved; the folder must be on a disk "
            "that all nodes share"
        )
    paths = {checkpoint / name for name in names}
    for path in paths | {path.parent for path in paths}:
        sync(path)
    files = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": digest}
        for name, digest in _digests(checkpoint, names).items()
    }
    text = json.dumps({"step": step_of(checkpoint), "files": files}, indent=2)
    write_atomically(checkpoint / SEAL, text + "\n")


def _check_owner(path: Path) -> None:
    owner = path.lstat().st_uid
    if owner != os.getuid():
        raise DataError(
            f"{path} belongs to user {owner}, not to you ({os.getuid()}): verl loads checkpoints "
            "with pickle, so its owner's code would run as you"
        )


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, every byte of which is read; None if it is whole.

    Raises:
        DataError: it, or a file in it, belongs to another user.
    """
    _check_owner(checkpoint)
    path = checkpoint / SEAL
    if not path.exists():
        return f"incomplete: it has no {SEAL}, so the run ended while it was saved"
    _check_owner(path)
    try:
        sealed = json.loads(path.read_text())
        step, files = sealed["step"], dict(sealed["files"])
        expected = {str(n): (int(f["bytes"]), str(f["sha256"])) for n, f in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"damaged: {SEAL} cannot be read ({error})"
    if step != step_of(checkpoint):
        return f"damaged: {SEAL} is of step {step}"
    present = set(_names(checkpoint))
    for name in sorted(expected.keys() ^ present):
        return f"damaged: {name} is {'missing' if name in expected else f'not in {SEAL}'}"
    for name in sorted(expected):
        _check_owner(checkpoint / name)
        if not stat.S_ISREG((checkpoint / name).lstat().st_mode):
            return f"damaged: {name} is not a plain file"
    for name, (size, _) in sorted(expected.items()):
        found = (checkpoint / name).stat().st_size
        if found != size:
            return f"damaged: {name} has {found} bytes, {SEAL} says {size}"
    for name, digest in _digests(checkpoint, expected).items():
        if digest != expected[name][1]:
            return f"damaged: {name} has another SHA-256 than {SEAL} says"
    return None


def choose(folder: Path) -> Chosen:
    """The newest checkpoint of a folder that is whole.

    Raises:
        DataError: there is none; names the folder, and what is wrong with each. Or one
            belongs to another user.
    """
    left_out: list[str] = []
    candidates = step_folders(folder)
    if not candidates:
        raise DataError(f"{folder} holds no checkpoint to go on from")
    _check_owner(folder)
    for step, path in candidates:
        wrong = fault(path)
        if wrong is None:
            return Chosen(path, step, tuple(left_out))
        left_out.append(f"{path.name} is {wrong}")
    raise DataError(f"{folder} holds no complete checkpoint: {'; '.join(left_out)}")


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its seal first: after a kill the rest counts as incomplete."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all complete checkpoints but the newest `count`; incomplete ones stay."""
    sealed = [path for _, path in step_folders(folder) if (path / SEAL).exists()]
    for path in sealed[count:]:
        remove(path)


def full_disk(error: BaseException, folder: Path) -> bool:
    """Whether an error comes from a full disk, an exhausted quota or a file's size limit.

    torch's own writer reports no error number, so a small file is written to find out, while the
    file that failed to be written is still in the folder.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return True
        # Ray keeps a worker's exception in an attribute.
        cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__
    probe = folder / ".space"
    try:
        with probe.open("wb") as stream:
            stream.write(bytes(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as refused:
        return refused.errno in FULL_DISK
    finally:
        probe.unlink(missing_ok=True)
    return False
