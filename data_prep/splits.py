"""Write the splits of a dataset in verl's schema: all of them appear, or none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.output import staging, write_errors
from hpo_verl.errors import DataError
from hpo_verl.runs.files import sync

Row = dict[str, Any]

_ROW_GROUP = 10_000


def verl_schema(
    ground_truth: pa.DataType,
    extra_info: Mapping[str, pa.DataType],
    metadata: Mapping[str, str] | None = None,
) -> pa.Schema:
    """Return the arrow schema of the rows that verl's `RLHFDataset` and reward loop read.

    verl itself uses `extra_info.index`. `metadata` says what was asked for: source, seed, ...
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
    out: str | Path, schema: pa.Schema, splits: Mapping[str, Iterable[Row]]
) -> dict[str, Path]:
    """Write `<out>/<split>.parquet` for every split; all of them appear, or none.

    Files of the same names are replaced.

    Returns:
        Split name -> path written.

    Raises:
        DataError: The folder or a file cannot be written (no permission, disk
            full, ...), or a split has no rows. Whatever the rows raise passes
            through. In each case nothing new stays behind.
    """
    paths = {split: Path(out) / f"{split}.parquet" for split in splits}
    with staging(Path(out)) as folder:
        for split, path in paths.items():
            if path.is_dir():
                raise DataError(f"{path}: is a folder; a file is to be written there")
            table = _table(schema, iter(splits[split]))
            if not table.num_rows:
                raise DataError(f"{path}: the split would have no rows; needed: 1 or more")
            with write_errors(path):
                pq.write_table(
                    table,
                    folder / path.name,
                    row_group_size=_ROW_GROUP,
                    compression="zstd",
                    write_page_checksum=True,
                )
                sync(folder / path.name)
        for path in paths.values():
            os.replace(folder / path.name, path)
    return paths


def _table(schema: pa.Schema, rows: Iterator[Row]) -> pa.Table:
    """Turn rows into a table, a group at a time: rows as dictionaries need much memory."""
    groups = iter(lambda: list(islice(rows, _ROW_GROUP)), [])
    batches = (pa.RecordBatch.from_pylist(group, schema=schema) for group in groups)
    return pa.Table.from_batches(batches, schema=schema)
