"""Questions with their answers, out of a file: read, checked row by row, divided."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import ConvertOptions, ParseOptions, read_csv

from data_prep.command import first_line
from hpo_verl.errors import DataError
from hpo_verl.rewards.result import unique_keys

_NOT_BLANK = re.compile(r"\S")


class Example(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


def read_examples(
    path: str | Path, question_key: str, answer_key: str, answers: Sequence[str] = ()
) -> list[Example]:
    """Read two columns of a parquet, jsonl or csv file; see `check_examples`.

    Raises:
        DataError: The file cannot be read, or a row is not as it must be; names row and column.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise DataError(f"{path}: a file name must end in one of {', '.join(_READERS)}")
    try:
        rows = _READERS[path.suffix](path, (question_key, answer_key))
    except DataError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read (damaged or truncated?): {first_line(error)}"
        ) from error
    return check_examples(rows, str(path), question_key, answer_key, answers)


def _read_parquet(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    table = pq.ParquetFile(path, page_checksum_verification=True).read()
    return _read_table(path, table, columns)


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    # As text, or 007 would be a number.
    types = ConvertOptions(column_types=dict.fromkeys(columns, pa.string()))
    lines = ParseOptions(newlines_in_values=True)
    return _read_table(path, read_csv(path, parse_options=lines, convert_options=types), columns)


def _read_table(path: Path, table: pa.Table, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the columns that are needed, each of which must be there once."""
    for column in columns:
        if (count := table.column_names.count(column)) != 1:
            there = ", ".join(map(repr, table.column_names))[:200]
            raise DataError(
                f"{path}: has the column '{column}' {count} times, not once; has {there}"
            )
    return table.select(list(columns)).to_pylist()


def _read_jsonl(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file; arrow's reader dies of deeply nested ones."""
    del columns
    text, rows, end = path.read_text(encoding="utf-8-sig"), [], 0
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    while found := _NOT_BLANK.search(text, end):
        try:
            row, end = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"row {len(rows) + 1}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"row {len(rows) + 1}: is no object; one on each line is needed")
        rows.append(row)
    return rows


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}


def check_examples(
    rows: Iterable[Mapping[str, Any]],
    name: str,
    question_key: str,
    answer_key: str,
    answers: Sequence[str] = (),
) -> list[Example]:
    """Check every row, and leave out those that repeat a question.

    An answer may be a number; it becomes a text. `answers` are those permitted, if not all are.

    Raises:
        DataError: A row is not as it must be, or there is none; names row and column.
    """
    examples: dict[str, tuple[Example, int]] = {}
    for number, row in enumerate(rows, start=1):
        place = f"{name}: row {number}"
        question = _text(row.get(question_key), f"{place}, column '{question_key}'")
        value = row.get(answer_key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
            value = str(value)
        answer = _text(value, f"{place}, column '{answer_key}'").strip()
        if answers and answer not in answers:
            raise DataError(
                f"{place}, column '{answer_key}': {answer[:40]!r} is not one of "
                f"{', '.join(answers)}"
            )
        example = Example(question, answer)
        earlier, where = examples.setdefault(question.strip(), (example, number))
        if earlier.answer != answer:
            raise DataError(
                f"{place}, column '{answer_key}': {answer[:40]}, but row {where} has the same "
                f"question with {earlier.answer[:40]}"
            )
    if not examples:
        raise DataError(f"{name}: has no rows; at least 1 is needed")
    return [example for example, _ in examples.values()]


def _text(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: is missing, empty or not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: holds a surrogate, which is half a letter") from error
    return value


def choose(
    examples: Mapping[str, list[Example]], sizes: Mapping[str, int | None], seed: int
) -> dict[str, list[Example]]:
    """Draw the rows of each split; no question is in both.

    A size of None takes all. Without a split "val", the rows of "train" are divided in two:
    a tenth is for validation, where its size is None.

    Raises:
        DataError: Fewer rows than asked for.
    """
    random = np.random.default_rng(seed)
    pool = {
        split: [rows[i] for i in random.permutation(len(rows))] for split, rows in examples.items()
    }
    if "val" not in pool:
        undivided = pool["train"]
        val_size = sizes["val"] or max(1, len(undivided) // 10)
        pool = {"val": undivided[:val_size], "train": undivided[val_size:]}
    else:
        held_out = {example.question.strip() for example in pool["val"]}
        pool["train"] = [x for x in pool["train"] if x.question.strip() not in held_out]
    for split, size in sizes.items():
        if size is not None and size > len(pool[split]):
            raise DataError(
                f"--{split}-size: {size} rows are asked for, {len(pool[split])} are there "
                "(after rows that repeat a question are left out)"
            )
    return {split: pool[split][: sizes[split]] for split in ("train", "val")}
