"""What the tests of the TeleLogs command share."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.command import run
from data_prep.telelogs import __main__ as telelogs


def command(*arguments: object) -> int:
    return run(telelogs.main, [str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one-line error of a command that must fail with exit code 2."""
    try:
        code = command(*arguments)
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def questions(count: int, prefix: str = "") -> list[dict[str, str]]:
    rows = list(telelogs.synthetic_rows("train", count, 1))
    return [{"question": prefix + row.question, "answer": row.answer} for row in rows]


def write_table(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path
