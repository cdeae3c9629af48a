"""The rows of a data file: each compared with verl's schema, and some kept."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
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


def read_rows(key: str, path: Path) -> Sample:
    """Check every row of a file, and keep some.

    Raises:
        DataError: names the setting, file, row (1 is the first) and column.
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
            # Of several faults in one row, the one of the first column.
            for row, column, text in sorted(_faults(batch), key=lambda fault: fault[0])[:1]:
                raise DataError(
                    f"{key}: {path}: row {position + row + 1}, column '{column}': {text}"
                )
            inside = [int(i) - position for i in wanted if 0 <= i - position < len(batch)]
            spread |= _taken(batch, inside, position)
            letters = _letters(batch.column("prompt"))
            # Equal lengths in the order of the rows.
            most = np.argsort(-letters, kind="stable")[:SAMPLE_ROWS]
            for place, row in _taken(batch, most, position).items():
                # The position keeps rows, which have no order, out of the comparison.
                longest.append((int(letters[place - position]), -place, row))
            longest = heapq.nlargest(SAMPLE_ROWS, longest)
            position += len(batch)
    except DataError:
        raise
    except (OSError, ValueError) as problem:
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


def _faults(batch: Any) -> Iterator[tuple[int, str, str]]:
    """Row, column and text of the first fault of each kind."""
    sources, truths = batch.column("data_source"), batch.column("reward_model")
    if pa.types.is_dictionary(sources.type):
        sources = sources.dictionary_decode()
    for row in _wrong(sources, _is_text(sources.type), pc.utf8_length):
        yield row, "data_source", f"{sources[row].as_py()!r} is not a name"
    for row in _wrong(
        truths,
        _has_fields(truths.type, "ground_truth"),
        lambda column: pc.is_valid(pc.struct_field(column, "ground_truth")),
    ):
        yield row, "reward_model", "has no ground_truth"
    prompts = batch.column("prompt")
    if not (pa.types.is_list(prompts.type) or pa.types.is_large_list(prompts.type)):
        yield 0, "prompt", f"{NO_CHAT}, but {str(prompts[0].as_py())[:40]!r}"
        return
    for row in _wrong(prompts, True, pc.list_value_length):
        yield row, "prompt", NO_CHAT
    messages, parents = pc.list_flatten(prompts), pc.list_parent_indices(prompts)
    if not _has_fields(prompts.type.value_type, "role", "content"):
        yield from ((parents[0].as_py(), "prompt", NO_CHAT) for _ in messages[:1])
        return
    role, content = (pc.struct_field(messages, name) for name in ("role", "content"))
    for message in _wrong(role, True, lambda column: pc.is_in(column, value_set=pa.array(ROLES))):
        text = f"a message needs a role, one of {', '.join(ROLES)}"
        yield parents[message].as_py(), "prompt", text
    for message in _wrong(content, _is_text(content.type), pc.is_valid):
        yield parents[message].as_py(), "prompt", "a message needs a text as its content"


def _wrong(column: Any, has_type: bool, test: Callable[[Any], Any]) -> Iterator[int]:
    """Position of the first value that is null or fails a test; the first where the type is wrong.

    A test gives true or more than 0 for a right value.
    """
    if len(column) and not has_type:
        yield 0
    elif len(column):
        right = pc.fill_null(pc.cast(test(column), pa.int64()), 0)
        first = pc.index(pc.equal(right, 0), True).as_py()
        yield from (first,) if first >= 0 else ()


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _has_fields(kind: Any, *names: str) -> bool:
    """Whether a type is a struct with fields of these names."""
    return pa.types.is_struct(kind) and all(kind.get_field_index(name) >= 0 for name in names)
