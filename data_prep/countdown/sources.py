"""Countdown puzzles that somebody else made: the hub's data set, or a file like it.

The hub's set is Jiayi-Pan/Countdown-Tasks-3to4: one split of 490,364 rows with
`nums` (list of integers) and `target`. TinyZero trains on its first 327,680 rows and
tests on the next 1,024; files with at least that many rows are split the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_prep.countdown.puzzles import SETS_AT_ONCE, Puzzle, PuzzleKey, count_solutions
from data_prep.countdown.trees import MAX_NUMBER
from data_prep.output import first_line
from data_prep.tables import column_names, read_rows
from hpo_verl.errors import DataError

HUB_DATASET = "Jiayi-Pan/Countdown-Tasks-3to4"
HUB_REVISION = "408f70d177020686d34a56bba5952feb45aaaee4"
HUB_FILE = "data/train-00000-of-00001.parquet"
TRAIN_ROWS = 327_680
VAL_ROWS = 1_024


class _Row(NamedTuple):
    number: int
    numbers: tuple[int, ...]
    target: int

    @property
    def key(self) -> PuzzleKey:
        return tuple(sorted(self.numbers)), self.target


def download(revision: str) -> Path:
    """Return the hub's file at a revision, from the local cache if it is there.

    Args:
        revision: Commit of the data set, 40 hexadecimal digits.

    Raises:
        DataError: It is neither in the cache nor can it be fetched.
    """
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(
            HUB_DATASET, HUB_FILE, repo_type="dataset", revision=revision
        )
    # The client raises errors of several libraries; each of them means the same here.
    except Exception as error:
        raise DataError(
            f"{HUB_DATASET}: {HUB_FILE} at revision {revision[:12]} cannot be fetched: "
            f"{first_line(error)}. Fetch that file where there is a network and give it as "
            "--source PATH"
        ) from error
    return Path(path)


def read_splits(
    path: Path,
    numbers: int,
    train_size: int | None,
    val_size: int | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Puzzle], list[Puzzle], int]:
    """Read the puzzles of `numbers` numbers and split them by row order.

    A file of at least `TRAIN_ROWS + VAL_ROWS` rows is split as TinyZero does, and then
    filtered; the sizes, if given, take the first puzzles of each split. In a smaller
    file the first `train_size` puzzles are for training and the next `val_size` for
    validation. A training puzzle that is also in validation, up to the order of its
    numbers, is left out, so that validation stays as published.

    Args:
        path: Parquet, jsonl or csv with the columns `nums` (or `numbers`) and `target`.
        numbers: How many numbers a puzzle has; rows with another count are skipped.
        train_size: Wanted training puzzles, or None for all.
        val_size: Wanted validation puzzles, or None for all.
        progress: Called with the puzzles solved so far and their total.

    Returns:
        Training puzzles, validation puzzles, and how many training rows were left out
        because they are in validation.

    Raises:
        DataError: The file is bad (see `read_rows`), a number or target is out of
            range, a target cannot be reached, or there are too few puzzles.
    """
    rows, total = _read(path, numbers)
    published = total >= TRAIN_ROWS + VAL_ROWS
    if published:
        train = [row for row in rows if row.number <= TRAIN_ROWS]
        val = [row for row in rows if TRAIN_ROWS < row.number <= TRAIN_ROWS + VAL_ROWS]
    elif train_size is None or val_size is None:
        raise DataError(
            f"{path}: has {total} rows, fewer than the {TRAIN_ROWS + VAL_ROWS} of TinyZero's "
            "split; say --train-size and --val-size"
        )
    else:
        train, val = rows[:train_size], rows[train_size:]

    def take(rows: list[_Row], size: int | None, split: str) -> list[_Row]:
        if len(rows) < (size or 1):
            raise DataError(
                f"{path}: {len(rows)} puzzles of {numbers} numbers for the {split} split, "
                f"but {size or 'at least 1'} wanted"
            )
        return rows[:size]

    val = take(val, val_size, "val")
    held_out = {row.key for row in val}
    kept = [row for row in train if row.key not in held_out]
    left_out = len(train) - len(kept)
    kept = take(kept, train_size if published else None, "train")
    solved = _solve(path, kept + val, progress)
    return solved[: len(kept)], solved[len(kept) :], left_out


def _read(path: Path, numbers: int) -> tuple[list[_Row], int]:
    """Return the rows with that many numbers, and the count of all rows."""
    name = "numbers" if "numbers" in column_names(path) else "nums"
    rows, total = [], 0
    for total, row in enumerate(read_rows(path, {name: "integers", "target": "integer"}), start=1):
        if len(row[name]) != numbers:
            continue
        bad = [value for value in row[name] if not 1 <= value <= MAX_NUMBER]
        if bad:
            raise DataError(
                f"{path}: row {total}, column '{name}': {bad[0]} is not from 1 to {MAX_NUMBER}"
            )
        if row["target"] < 1:
            raise DataError(f"{path}: row {total}, column 'target': {row['target']} is below 1")
        rows.append(_Row(total, tuple(row[name]), row["target"]))
    return rows, total


def _solve(path: Path, rows: list[_Row], progress: Callable[[int, int], None]) -> list[Puzzle]:
    puzzles: list[Puzzle] = []
    step = SETS_AT_ONCE[len(rows[0].numbers)]
    for start in range(0, len(rows), step):
        batch = rows[start : start + step]
        found = count_solutions([row.numbers for row in batch], [row.target for row in batch])
        for row, (difficulty, solution) in zip(batch, found, strict=True):
            if difficulty == 0:
                raise DataError(
                    f"{path}: row {row.number}, column 'target': {row.target} cannot be "
                    f"reached with {list(row.numbers)}"
                )
            puzzles.append(Puzzle(row.numbers, row.target, difficulty, solution))
        progress(len(puzzles), len(rows))
    return puzzles
