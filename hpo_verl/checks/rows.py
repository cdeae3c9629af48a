"""The rows of a data file: each compared with verl's schema, and some kept."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from hpo_verl.checks.finding import one_line
from hpo_verl.errors import DataError

SAMPLE_ROWS = 100
BATCH_ROWS = 8_192
REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")
COLUMNS = (*REQUIRED_COLUMNS, "extra_info")
ROLES = ("system", "user", "assistant", "tool")
NO_CHAT = "is not a list of chat messages, each with a role and a content"


class Sample(NamedTuple):
    """The number of rows of a file, and some of them by their position.

    `spread` are taken evenly over the file, `longest` have the most letters in their prompt.
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
    wanted = {i * rows // SAMPLE_ROWS for i in range(SAMPLE_ROWS)} if rows else set()
    columns = [name for name in COLUMNS if name in file.schema_arrow.names]
    spread: dict[int, Mapping[str, Any]] = {}
    longest: list[tuple[int, int, Mapping[str, Any]]] = []
    position = 0
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                if fault := _fault(row):
                    column, text = fault
                    where = f"{key}: {path}: row {position + 1}, column '{column}'"
                    raise DataError(f"{where}: {text}")
                if position in wanted:
                    spread[position] = row
                letters = sum(len(message["content"]) for message in row["prompt"])
                # The position keeps rows, which have no order, out of the comparison.
                longest.append((letters, -position, row))
                position += 1
            longest = heapq.nlargest(SAMPLE_ROWS, longest)
    except DataError:
        raise
    except (OSError, ValueError) as problem:
        text = f"{key}: {path}: cannot read on after row {position}: {one_line(problem)}"
        raise DataError(text) from problem
    return Sample(rows, spread, {-negative: row for _, negative, row in longest})


def _fault(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The column of a row that is not in the schema, and what is wrong with it."""
    source, reward, prompt = row["data_source"], row["reward_model"], row["prompt"]
    extra = row.get("extra_info")
    if not source or not isinstance(source, str):
        return "data_source", f"{source!r} is not a name"
    if not isinstance(reward, dict) or reward.get("ground_truth") is None:
        return "reward_model", "has no ground_truth"
    if extra is not None and not isinstance(extra, dict):
        return "extra_info", f"{str(extra)[:40]!r} is not a struct"
    if not isinstance(prompt, list):
        return "prompt", f"{NO_CHAT}, but {str(prompt)[:40]!r}"
    chat = all(isinstance(entry, dict) and {"role", "content"} <= entry.keys() for entry in prompt)
    if not prompt or not chat:
        return "prompt", NO_CHAT
    for message in prompt:
        if message["role"] not in ROLES:
            return "prompt", f"a message needs a role, one of {', '.join(ROLES)}"
        if not isinstance(message["content"], str):
            return "prompt", "a message needs a text as its content"
    return None
