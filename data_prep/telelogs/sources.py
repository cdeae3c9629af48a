"""Where real TeleLogs rows come from, and where they may not go.

The dataset `netop/TeleLogs` (arXiv 2507.21974) is gated and its authors ask that it is not shared
again: its rows are read with the user's own token or from the user's own file, and are never
written into a repository.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import ParseOptions, read_csv

from data_prep.command import first_line
from hpo_verl.errors import DataError
from hpo_verl.rewards.result import unique_keys
from hpo_verl.rewards.telelogs import CAUSES

HUB_DATASET = "netop/TeleLogs"
HUB_SPLITS = {"train": "train", "val": "test"}
HOW_TO_ASK = (
    f"ask for access on https://huggingface.co/datasets/{HUB_DATASET} (log in, accept the "
    "conditions, wait for the authors' approval), make a token with read permission on "
    f"https://huggingface.co/settings/tokens and set it as HF_TOKEN; "
    "--source synthetic needs no access"
)
_COLUMNS = ("question", "answer")
_NOT_BLANK = re.compile(r"\S")


class Example(NamedTuple):
    """A question and its cause."""

    question: str
    answer: str


def read_examples(path: str | Path) -> list[Example]:
    """Read the columns question and answer of a parquet, jsonl or csv file.

    Raises:
        DataError: The file cannot be read, or a row is not as it must be; names row and column.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise DataError(f"{path}: a file name must end in one of {', '.join(_READERS)}")
    try:
        rows = _READERS[path.suffix](path)
    except DataError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read (damaged or truncated?): {first_line(error)}"
        ) from error
    return _checked(rows, str(path))


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    return _read_table(path, pq.ParquetFile(path, page_checksum_verification=True).read())


def _read_csv(path: Path) -> list[dict[str, Any]]:
    return _read_table(path, read_csv(path, parse_options=ParseOptions(newlines_in_values=True)))


def _read_table(path: Path, table: pa.Table) -> list[dict[str, Any]]:
    """The rows of the columns that are needed, each of which must be there once."""
    for column in _COLUMNS:
        if (count := table.column_names.count(column)) != 1:
            there = ", ".join(map(repr, table.column_names))[:200]
            raise DataError(
                f"{path}: has the column '{column}' {count} times, not once; has {there}"
            )
    return table.select(_COLUMNS).to_pylist()


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; arrow's reader dies of deeply nested ones."""
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


def read_hub(revision: str | None) -> tuple[dict[str, list[Example]], str]:
    """Read both splits of the hub's dataset at one commit, with the user's token.

    Args:
        revision: Commit to read, 40 hexadecimal digits; None takes the newest of `main`.

    Returns:
        Split ("train", "val") -> rows, and the commit.

    Raises:
        DataError: No token or access, no such commit, no network, or a bad row.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise DataError(f"HF_TOKEN is not set and {HUB_DATASET} is a gated dataset: {HOW_TO_ASK}")
    try:
        commit = revision or _newest_commit(token)
        rows = {split: _hub_rows(name, token, commit) for split, name in HUB_SPLITS.items()}
    # The hub's client raises errors of five libraries; each of them means the same here.
    except Exception as error:
        raise DataError(
            f"{HUB_DATASET}: cannot be read ({type(error).__name__}: {first_line(error)}); "
            f"if access is what is missing, {HOW_TO_ASK}"
        ) from error
    name = f"{HUB_DATASET}@{commit[:8]}"
    return {split: _checked(rows[split], f"{name} {HUB_SPLITS[split]}") for split in rows}, commit


def _newest_commit(token: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(HUB_DATASET, revision="main", token=token).sha)


def _hub_rows(split: str, token: str, commit: str) -> Iterable[Any]:
    """The only function that reads rows over the network."""
    from datasets import load_dataset

    def load(name: str | None) -> Iterable[Any]:
        return load_dataset(HUB_DATASET, name, split=split, revision=commit, token=token)

    try:
        # The dataset was published under this configuration name and also without one.
        return load("troubleshooting")
    except ValueError as error:
        # What `datasets` raises for a configuration that does not exist.
        if "BuilderConfig" not in str(error):
            raise
        return load(None)


def _checked(rows: Iterable[Mapping[str, Any]], name: str) -> list[Example]:
    """Check every row, and leave out those that repeat a question."""
    examples: dict[str, tuple[Example, int]] = {}
    for number, row in enumerate(rows, start=1):
        place = f"{name}: row {number}"
        for column in _COLUMNS:
            value = row.get(column)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{place}, column '{column}': is missing, empty or not text")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                text = "holds a surrogate, which is half a letter"
                raise DataError(f"{place}, column '{column}': {text}") from error
        example = Example(row["question"], row["answer"].strip())
        if example.answer not in CAUSES:
            raise DataError(
                f"{place}, column 'answer': {example.answer[:40]!r} is not one of C1 to C8"
            )
        earlier, where = examples.setdefault(example.question.strip(), (example, number))
        if earlier.answer != example.answer:
            raise DataError(
                f"{place}, column 'answer': {example.answer}, but row {where} has the same "
                f"question with {earlier.answer}"
            )
    if not examples:
        raise DataError(f"{name}: has no rows; at least 1 is needed")
    return [example for example, _ in examples.values()]


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


def check_outside_repositories(out: str | Path) -> None:
    """Raise DataError if `out`, the folder for real rows, lies in a repository."""
    folder = Path(out).resolve()
    for parent in (folder, *folder.parents):
        if (parent / ".git").exists():
            raise DataError(
                f"--out: {folder} lies in the repository {parent}; TeleLogs rows must not be "
                "shared again, so choose a folder outside any repository"
            )
