"""The rows of a data file: each compared with verl's schema, and some kept."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from hpo_verl.checks.finding import first_line
from hpo_verl.errors import DataError

# Its functions are made at run time, so that a type checker knows none.
pc: Any = pyarrow.compute
SAMPLE_ROWS = 100
BATCH_ROWS = 8_192
REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")
COLUMNS = (*REQUIRED_COLUMNS, "extra_info")
ROLES = ("system", "user", "assistant", "tool")
NO_CHAT = "is not a list of chat messages, each with a role and a content"


class Sample(NamedTuple):
    """Rows of a file.

    Attributes:
        rows: number of all of them.
        spread: position -> row, evenly over the file.
        longest: position -> row, those with the most letters in their prompt.
    """

    rows: int
    spread: dict[int, Mapping[str, Any]]
    longest: dict[int, Mapping[str, Any]]


class Fault(NamedTuple):
    """The first row of a batch that is not in the schema."""

    row: int
    column: str
    text: str


def read_rows(key: str, path: Path) -> Sample:
    """Check every row of a file, and keep some.

    Args:
        key: the setting that names the file.
        path: a parquet file with verl's columns.

    Raises:
        DataError: names key, file, row (1 is the first) and column.
    """
    file = pq.ParquetFile(path)
    rows = file.metadata.num_rows
    wanted = np.unique([i * rows // SAMPLE_ROWS for i in range(SAMPLE_ROWS)]) if rows else ()
    spread: dict[int, Mapping[str, Any]] = {}
    longest: list[tuple[int, int, Mapping[str, Any]]] = []
    position = 0
    columns = [name for name in COLUMNS if name in file.schema_arrow.names]
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            if fault := first_fault(batch):
                raise DataError(
                    f"{key}: {path}: row {position + fault.row + 1}, column '{fault.column}': "
                    f"{fault.text}"
                )
            inside = [int(i) - position for i in wanted if 0 <= i - position < len(batch)]
            spread |= _taken(batch, inside, position)
            letters = _letters(batch.column("prompt"))
            # Equal lengths in the order of the rows.
            most = np.argsort(-letters, kind="stable")[:SAMPLE_ROWS]
            for place, row in _taken(batch, most, position).items():
                # The position keeps rows, which have no order, out of the comparison.
                heapq.heappush(longest, (int(letters[place - position]), -place, row))
                if len(longest) > SAMPLE_ROWS:
                    heapq.heappop(longest)
            position += len(batch)
    except (OSError, ValueError) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(
            f"{key}: {path}: cannot read on after row {position}: {first_line(problem)}"
        ) from problem
    return Sample(rows, spread, {-negative: row for _, negative, row in longest})


def _taken(batch: Any, indices: Any, position: int) -> dict[int, Mapping[str, Any]]:
    """Rows of a batch as dictionaries, by their position in the file."""
    taken = batch.take(pa.array(indices, pa.int64())).to_pylist()
    return {position + int(i): row for i, row in zip(indices, taken, strict=True)}


def _letters(prompts: Any) -> np.ndarray:
    """Letters of each prompt, of a column that is in the schema."""
    content = pc.struct_field(pc.list_flatten(prompts), "content")
    lengths = pc.utf8_length(content).to_numpy(zero_copy_only=False)
    parents = pc.list_parent_indices(prompts).to_numpy(zero_copy_only=False)
    return np.bincount(parents, weights=lengths, minlength=len(prompts)).astype(np.int64)


def first_fault(batch: Any) -> Fault | None:
    """The first row that is not in verl's schema; None if all are.

    Args:
        batch: a `pyarrow.RecordBatch` with the required columns.
    """
    faults = [
        Fault(row, column, text)
        for column, look in (
            ("data_source", _wrong_sources),
            ("reward_model", _wrong_truths),
            ("prompt", _wrong_prompts),
        )
        for row, text in look(batch.column(column))
    ]
    # Of several in one row, the one of the first column.
    return min(faults, key=lambda fault: fault.row, default=None)


def _first(wrong: Any) -> Iterator[int]:
    """Position of the first true value of a boolean array, if there is any."""
    found = pc.index(wrong, True).as_py()
    if found >= 0:
        yield found


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _wrong_sources(column: Any) -> Iterator[tuple[int, str]]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    wrong = pa.array([True] * len(column))
    if _is_text(column.type):
        wrong = pc.equal(pc.fill_null(pc.utf8_length(column), 0), 0)
    for row in _first(wrong):
        yield row, f"{column[row].as_py()!r} is not a name"


def _wrong_truths(column: Any) -> Iterator[tuple[int, str]]:
    wrong = pa.array([True] * len(column))
    if _has_fields(column.type, "ground_truth"):
        wrong = pc.is_null(pc.struct_field(column, "ground_truth"))
    for row in _first(wrong):
        yield row, "has no ground_truth"


def _wrong_prompts(column: Any) -> Iterator[tuple[int, str]]:
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        if len(column):
            yield 0, f"{NO_CHAT}, but {str(column[0].as_py())[:40]!r}"
        return
    for row in _first(pc.equal(pc.fill_null(pc.list_value_length(column), 0), 0)):
        yield row, NO_CHAT
    messages, parents = pc.list_flatten(column), pc.list_parent_indices(column)
    if not len(messages):
        return
    if not _has_fields(kind.value_type, "role", "content"):
        yield parents[0].as_py(), NO_CHAT
        return
    roles = pc.is_in(pc.struct_field(messages, "role"), value_set=pa.array(ROLES))
    for message in _first(pc.invert(roles)):
        yield parents[message].as_py(), f"a message needs a role, one of {', '.join(ROLES)}"
    content = pc.struct_field(messages, "content")
    texts = pc.is_valid(content) if _is_text(content.type) else pa.array([False] * len(messages))
    for message in _first(pc.invert(texts)):
        yield parents[message].as_py(), "a message needs a text as its content"


def _has_fields(kind: Any, *names: str) -> bool:
    """Whether a type is a struct with fields of these names."""
    return pa.types.is_struct(kind) and all(kind.get_field_index(name) >= 0 for name in names)
