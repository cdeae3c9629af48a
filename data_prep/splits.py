"""Write the splits of a dataset in verl's schema: all of them appear, or none.

Rows go to temporary files beside their destination, which are renamed only
after the last row of the last split is on disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.tables import Row, first_line
from hpo_verl.errors import DataError


def verl_schema(
    ground_truth: pa.DataType,
    extra_info: Mapping[str, pa.DataType],
    metadata: Mapping[str, str] | None = None,
) -> pa.Schema:
    """Return the arrow schema of the rows that verl's `RLHFDataset` and reward loop read.

    Args:
        ground_truth: Type of `reward_model.ground_truth`.
        extra_info: Fields of `extra_info`; verl itself uses `index`.
        metadata: Provenance kept in the file (what was asked for: source, seed, ...).
    """
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(message)),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", ground_truth)])),
            ("extra_info", pa.struct(list(extra_info.items()))),
        ],
        metadata=dict(metadata or {}),
    )


def write_splits(
    out: str | Path,
    schema: pa.Schema,
    splits: Mapping[str, Iterable[list[Row]]],
) -> dict[str, Path]:
    """Write `<out>/<split>.parquet` for every split; all of them appear, or none.

    Args:
        out: Folder, made if missing; files of the same names are replaced.
        schema: Schema of all splits.
        splits: Split name -> chunks of rows, consumed one at a time and in order,
            each written as one row group, so that memory holds one chunk.

    Returns:
        Split name -> path written.

    Raises:
        DataError: The folder or a file cannot be written (no permission, disk
            full, ...), or a split has no rows. Whatever the chunks raise passes
            through. In each case nothing new stays behind.
    """
    out = Path(out)
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    paths = {split: out / f"{split}.parquet" for split in splits}
    temporary = {
        split: path.with_name(f".{path.name}.{os.getpid()}.tmp") for split, path in paths.items()
    }
    done = False
    try:
        with _write_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        for path in paths.values():
            if path.is_dir():
                raise DataError(f"{path}: is a folder; a file is to be written there")
        for split, chunks in splits.items():
            _write_parquet(temporary[split], schema, chunks, paths[split])
        with _write_errors(out):
            for split, path in paths.items():
                os.replace(temporary[split], path)
        done = True
    finally:
        if not done:
            for path in temporary.values():
                with contextlib.suppress(OSError):
                    path.unlink()
            for folder in new_folders:
                with contextlib.suppress(OSError):
                    folder.rmdir()
    return paths


def check_output(out: str | Path) -> None:
    """Raise DataError if files cannot be made under `out`: call before long work."""
    out = Path(out)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise DataError(f"{out}: {existing} is a file; a folder is needed")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DataError(f"{out}: no permission to write in {existing}")
    if shutil.disk_usage(existing).free == 0:
        raise DataError(f"{out}: no space left on the disk of {existing}")


def _write_parquet(
    temporary: Path, schema: pa.Schema, chunks: Iterable[list[Row]], path: Path
) -> None:
    rows = 0
    with _write_errors(path):
        writer = pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True)
    try:
        for chunk in chunks:
            rows += len(chunk)
            table = pa.Table.from_pylist(chunk, schema=schema)
            with _write_errors(path):
                writer.write_table(table)
    except BaseException:
        # Closing writes the footer, which fails again on a full disk.
        with contextlib.suppress(OSError, pa.ArrowException):
            writer.close()
        raise
    with _write_errors(path):
        writer.close()
        if rows:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
    if not rows:
        raise DataError(f"{path}: the split would have no rows; at least 1 is needed")


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC or "No space left" in str(error)
        reason = "no space left on the disk" if full else first_line(error)
        raise DataError(f"{path}: cannot be written: {reason}") from error
