"""Read the rows of a parquet, jsonl or csv file.

Every error names the file, the row (1 is the first row of data; in a jsonl
file, the line) and the column.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.output import first_line
from hpo_verl.errors import DataError

Kind = Literal["text", "integer", "integers"]
Row = dict[str, Any]

SUFFIXES = (".parquet", ".jsonl", ".csv")
MAX_TEXT_CHARACTERS = 1_000_000
MAX_LINE_BYTES = 8_000_000
_INT64 = range(-(2**63), 2**63)


def read_rows(path: str | Path, columns: Mapping[str, Kind]) -> Iterator[Row]:
    """Yield the rows of a table as dictionaries that hold the named columns.

    Args:
        path: A `.parquet`, `.jsonl` or `.csv` file (utf-8; csv with a header line).
        columns: Column name -> kind. `text` is a str of at most
            `MAX_TEXT_CHARACTERS`; `integer` an int of 64 bits; `integers` a list
            of them (in csv, written as JSON: `[3, 7, 2]`).

    Raises:
        DataError: The file is missing, unreadable, empty or truncated, a column
            is missing, or a value is null or not of its kind.
    """
    path = Path(path)
    _check_file(path)
    reader = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}[path.suffix]
    number = 0
    try:
        for number, row in reader(path, columns):
            yield {
                name: _checked(row, name, kind, f"{path}: row {number}")
                for name, kind in columns.items()
            }
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: cannot read on after row {number} "
            f"({path.suffix[1:]} file damaged or truncated?): {first_line(error)}"
        ) from error
    if number == 0:
        raise DataError(f"{path}: has no rows; at least 1 is needed")


def column_names(path: str | Path) -> list[str]:
    """Return the column names of a table; for jsonl, the keys of its first line."""
    path = Path(path)
    _check_file(path)
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        if path.suffix == ".csv":
            return list(_csv_reader(path).fieldnames or [])
        return list(next(_jsonl_rows(path, {}), (0, {}))[1])
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read its columns: {first_line(error)}") from error


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


def _require_columns(path: Path, wanted: Mapping[str, Kind], present: Iterable[str]) -> None:
    present = list(present)
    for name in wanted:
        if name not in present:
            raise DataError(f"{path}: row 1: column '{name}' is missing; the file has {present}")


def _parquet_rows(path: Path, columns: Mapping[str, Kind]) -> Iterator[tuple[int, Row]]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        _require_columns(path, columns, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(batch_size=10_000, columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _jsonl_rows(path: Path, columns: Mapping[str, Kind]) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}: row {number}: longer than {MAX_LINE_BYTES} bytes")
            if not line.strip():
                raise DataError(f"{path}: row {number}: the line is blank")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: row {number}: is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}: row {number}: is not a JSON object")
            for name in columns:
                if name not in row:
                    raise DataError(
                        f"{path}: row {number}: column '{name}' is missing; "
                        f"the row has {list(row)[:20]}"
                    )
            yield number, row


def _csv_reader(path: Path) -> csv.DictReader[str]:
    def lines() -> Iterator[str]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file

    return csv.DictReader(lines(), strict=True)


def _csv_rows(path: Path, columns: Mapping[str, Kind]) -> Iterator[tuple[int, Row]]:
    reader = _csv_reader(path)
    _require_columns(path, columns, reader.fieldnames or [])
    for number, row in enumerate(reader, start=1):
        if None in row:
            raise DataError(f"{path}: row {number}: more cells than the header has columns")
        for name, kind in columns.items():
            if kind != "text" and row[name] is not None:
                with contextlib.suppress(ValueError, RecursionError):
                    row[name] = json.loads(row[name])
        yield number, row


def _checked(row: Row, name: str, kind: Kind, place: str) -> Any:
    value = row[name]
    if value is None:
        raise DataError(f"{place}, column '{name}': is missing or null")
    if kind == "text":
        if not isinstance(value, str):
            raise DataError(f"{place}, column '{name}': {_shown(value)} is not text")
        if len(value) > MAX_TEXT_CHARACTERS:
            raise DataError(
                f"{place}, column '{name}': {len(value)} characters; "
                f"at most {MAX_TEXT_CHARACTERS} are allowed"
            )
        return value
    if kind == "integers" and not isinstance(value, list):
        raise DataError(f"{place}, column '{name}': {_shown(value)} is not a list of integers")
    for entry in value if kind == "integers" else [value]:
        if type(entry) is not int or entry not in _INT64:
            raise DataError(
                f"{place}, column '{name}': {_shown(entry)} is not an integer of 64 bits"
            )
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
