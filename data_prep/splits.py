"""Write the splits of a dataset in verl's schema: all of them appear, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.output import staging, write_errors
from data_prep.tables import Row
from hpo_verl.errors import DataError
from hpo_verl.runs.files import sync

_ROW_GROUP = 10_000


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
    splits: Mapping[str, Iterable[Row]],
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Path]:
    """Write `<out>/<split>.parquet` for every split; all of them appear, or none.

    Args:
        out: Folder, made if missing; files of the same names are replaced.
        schema: Schema of all splits.
        splits: Split name -> rows, consumed in order; memory holds one row group of them.
        progress: Told the number of further rows written.

    Returns:
        Split name -> path written.

    Raises:
        DataError: The folder or a file cannot be written (no permission, disk
            full, ...), or a split has no rows. Whatever the rows raise passes
            through. In each case nothing new stays behind.
    """
    paths = {split: Path(out) / f"{split}.parquet" for split in splits}
    with staging(Path(out)) as folder:
        for path in paths.values():
            if path.is_dir():
                raise DataError(f"{path}: is a folder; a file is to be written there")
        for split, rows in splits.items():
            with write_errors(paths[split]):
                written = _write_parquet(folder / f"{split}.parquet", schema, rows, progress)
            if not written:
                raise DataError(f"{paths[split]}: the split would have no rows; needed: 1 or more")
        for path in paths.values():
            os.replace(folder / path.name, path)
    return paths


def _write_parquet(
    path: Path, schema: pa.Schema, rows: Iterable[Row], progress: Callable[[int], None]
) -> int:
    """Write a file and return its number of rows."""
    rows, written = iter(rows), 0
    writer = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
    try:
        while chunk := list(islice(rows, _ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
            written += len(chunk)
            progress(len(chunk))
    except BaseException:
        # Closing writes the footer, which fails again on a full disk.
        with contextlib.suppress(OSError, pa.ArrowException):
            writer.close()
        raise
    writer.close()
    sync(path)
    return written
