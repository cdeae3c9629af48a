"""Files that people brought to other projects, by the row of README.md that tells of each."""

import contextlib
import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.telelogs.sources import read_file
from hpo_verl.checks.rows import read_rows
from hpo_verl.errors import DataError

QUESTIONS = [f"Question {i}: throughput below 600Mbps | a | b |" for i in range(6)]
PAIRS = [(question, f"C{i + 1}") for i, question in enumerate(QUESTIONS)]
ROWS = [{"question": question, "answer": answer} for question, answer in PAIRS]


def table(rows, **dialect):
    """Bytes of a CSV file with the header that is needed."""
    text = io.StringIO()
    csv.writer(text, **dialect).writerows([("question", "answer"), *rows])
    return text.getvalue().encode()


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


JSON_QUESTIONS = [(json.dumps({"q": question, "n": [1]}), answer) for question, answer in PAIRS]
LATE = [{"question": f"{i} " + "x" * 900, "answer": "C1", "note": None} for i in range(2000)]
READ = [
    (9, "a.csv", b"\xef\xbb\xbf" + table(PAIRS), 6),
    (9, "a.jsonl", b"\xef\xbb\xbf" + lines(ROWS), 6),
    (11, "a.jsonl", b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS), 6),
    (13, "a.jsonl", lines([*LATE, {"question": "q", "answer": "C1", "note": "late"}]), 2001),
    (14, "a.csv", table(JSON_QUESTIONS), 6),
    (65, "a.csv", table([(f"{question}\r\nsecond", answer) for question, answer in PAIRS]), 6),
    (66, "a.csv", table(PAIRS, lineterminator="\r"), 6),
]
REFUSED = [
    (12, "a.json", json.dumps(ROWS).encode(), "must end in one of"),
    (15, "a.csv", b'question,answer\n"{\\"q\\": \\"a\\", \\"n\\": 1}",C1\n', "cannot be read"),
    (19, "a.jsonl", lines(ROWS) + b'\n{"question":"\\ud800","answer":"C1"}\n', "surrogate"),
    (52, "a.csv", table(PAIRS, delimiter=";"), "column"),
    (52, "a.csv", table(PAIRS).decode().encode("utf-16"), "a.csv"),
    (63, "a.csv", table([(question, 3) for question in QUESTIONS]), "row 1, column 'answer'"),
    (69, "a.jsonl", lines(ROWS)[:-10], "cannot be read"),
    (70, "a.csv", b"question,answer\nq\xa0,C1\n", "a.csv"),
]


@pytest.mark.parametrize(("row", "name", "content", "count"), READ)
def test_files_that_are_read(tmp_path, row, name, content, count):
    (tmp_path / name).write_bytes(content)
    examples = read_file(tmp_path / name)
    assert len(examples) == count
    assert {example.answer for example in examples} <= {f"C{i}" for i in range(1, 9)}
    assert not examples[0].question.startswith("\ufeff")


@pytest.mark.parametrize(("row", "name", "content", "words"), REFUSED)
def test_files_that_are_refused_in_one_line(tmp_path, row, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_file(tmp_path / name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def chat(**changes):
    """A row of verl's schema."""
    return {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": "1 2 = 3"}],
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"index": 1},
        **changes,
    }


OWN = [
    (57, chat(extra_info=None), None),
    (57, {key: value for key, value in chat().items() if key != "extra_info"}, None),
    (57, chat(extra_info={"index": "7", "deep": {"a": [{"b": 1}]}}), None),
    (57, chat(extra_info={"index": None}), None),
]


@pytest.mark.parametrize(("row", "content", "words"), OWN)
def test_rows_of_ones_own(tmp_path, row, content, words):
    path = tmp_path / "own.parquet"
    pq.write_table(pa.Table.from_pylist([content] * 3), path)
    refused = pytest.raises(DataError, match=words) if words else contextlib.nullcontext()
    with refused:
        assert read_rows("data.train_files", path).rows == 3
