"""Write the splits of a dataset in verl's schema: all of them appear, or none.

Rows go to temporary files beside their destination, which are renamed only
after the last row of the last split is on disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.output import staging, write_errors
from data_prep.tables import Row
from hpo_verl.errors import DataError
from hpo_verl.runs.files import sync


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
    paths = {split: out / f"{split}.parquet" for split in splits}
    with staging(out) as folder:
        for path in paths.values():
            if path.is_dir():
                raise DataError(f"{path}: is a folder; a file is to be written there")
        for split, chunks in splits.items():
            _write_parquet(folder / paths[split].name, schema, chunks, paths[split])
        for path in paths.values():
            os.replace(folder / path.name, path)
    return paths


def _write_parquet(
    temporary: Path, schema: pa.Schema, chunks: Iterable[list[Row]], path: Path
) -> None:
    rows = 0
    with write_errors(path):
        writer = pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True)
    try:
        for chunk in chunks:
            rows += len(chunk)
            table = pa.Table.from_pylist(chunk, schema=schema)
            with write_errors(path):
                writer.write_table(table)
    except BaseException:
        # Closing writes the footer, which fails again on a full disk.
        with contextlib.suppress(OSError, pa.ArrowException):
            writer.close()
        raise
    with write_errors(path):
        writer.close()
        if rows:
            sync(temporary)
    if not rows:
        raise DataError(f"{path}: the split would have no rows; at least 1 is needed")
