"""Read columns of text from a parquet, jsonl or csv file.

Every error names the file, the row (1 is the first row of data; in a jsonl
file, the line) and the column.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.output import first_line
from hpo_verl.errors import DataError

Row = dict[str, Any]

SUFFIXES = (".parquet", ".jsonl", ".csv")
MAX_TEXT_CHARACTERS = 1_000_000
MAX_LINE_BYTES = 8_000_000


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a table as dictionaries that hold the named columns.

    Args:
        path: A `.parquet`, `.jsonl` or `.csv` file (utf-8; csv with a header line).
        columns: Names of columns that hold texts of at most `MAX_TEXT_CHARACTERS`.

    Raises:
        DataError: The file is missing, unreadable, empty or truncated, a column
            is missing, or a value is null, not text or too long.
    """
    path = Path(path)
    _check_file(path)
    reader = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}[path.suffix]
    number = 0
    try:
        for number, row in enumerate(reader(path, columns), start=1):
            _require_columns(f"{path}: row {number}", columns, row)
            yield {name: _text(row[name], f"{path}: row {number}", name) for name in columns}
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: cannot read on after row {number} "
            f"({path.suffix[1:]} file damaged or truncated?): {first_line(error)}"
        ) from error
    if number == 0:
        raise DataError(f"{path}: has no rows; at least 1 is needed")


def _check_file(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: a file name must end in one of {', '.join(SUFFIXES)}")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: is not a regular file")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: no permission to read")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty (0 bytes)")


def _require_columns(place: str, wanted: Sequence[str], present: Iterable[str]) -> None:
    present = list(present)
    for name in wanted:
        if name not in present:
            raise DataError(f"{place}: column '{name}' is missing; there are {present[:20]}")


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        _require_columns(f"{path}: row 1", columns, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=10_000, columns=list(columns)):
            yield from batch.to_pylist()


def _jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"{path}: row {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{place}: longer than {MAX_LINE_BYTES} bytes")
            if not line.strip():
                raise DataError(f"{place}: the line is blank")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{place}: is not a JSON object")
            yield row


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        _require_columns(f"{path}: row 1", columns, reader.fieldnames or [])
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise DataError(f"{path}: row {number}: more cells than the header has columns")
            yield row


def _text(value: object, place: str, name: str) -> str:
    if value is None:
        raise DataError(f"{place}, column '{name}': is missing or null")
    if not isinstance(value, str):
        shown = repr(value)
        raise DataError(f"{place}, column '{name}': {shown[:60]} is not text")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise DataError(
            f"{place}, column '{name}': {len(value)} characters; "
            f"at most {MAX_TEXT_CHARACTERS} are allowed"
        )
    return value
