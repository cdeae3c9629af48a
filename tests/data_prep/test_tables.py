import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import tables
from data_prep.tables import read_rows
from hpo_verl.errors import DataError

COLUMNS = ["name", "note"]
ROWS = [{"name": "x", "note": "a, b\n“c”"}, {"name": "y", "note": ""}]


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text('name,note\nx,"a, b\n“c”"\ny,\n', encoding="utf-8-sig")
    return path


def errors(path, columns=COLUMNS):
    with pytest.raises(DataError) as caught:
        list(read_rows(path, columns))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_three_formats_read_alike(tmp_path, suffix):
    path = write(tmp_path / f"table.{suffix}")
    assert list(read_rows(path, COLUMNS)) == ROWS
    assert list(read_rows(str(path), ["name"])) == [{"name": "x"}, {"name": "y"}]
    assert "row 1: column 'answer' is missing" in errors(path, ["answer"])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none.parquet", None, "no such file"),
        ("table.txt", "x", "must end in one of .parquet, .jsonl, .csv"),
        ("table", "x", "must end in one of"),
        ("empty.parquet", "", "is empty (0 bytes)"),
        ("empty.jsonl", "", "is empty (0 bytes)"),
        ("empty.csv", "", "is empty (0 bytes)"),
        ("header.csv", "name,note\n", "has no rows"),
        ("text.parquet", "not parquet", "row 0 (parquet file damaged or truncated?)"),
        ("a.jsonl", '{"name": "x"', "row 1: is not JSON"),
        ("b.jsonl", '{"name":"x","note":""}\n\n', "row 2: the line is blank"),
        ("c.jsonl", "[1]\n", "row 1: is not a JSON object"),
        ("d.jsonl", "[" * 100_000, "row 1: is not JSON"),
        ("e.jsonl", '{"name":"x"}\n', "row 1: column 'note' is missing"),
        ("f.jsonl", b'{"name":"x","note":"\xff"}\n', "row 1: is not JSON"),
        ("g.csv", "name,note\nx,x,y\n", "row 1: more cells than the header"),
        ("h.csv", "name,note\nx\n", "row 1, column 'note': is missing or null"),
        ("i.csv", 'name,note\nx,"x\n', "csv file damaged or truncated?"),
        ("j.csv", b"name,note\nx,\xff\n", "csv file damaged or truncated?"),
    ],
)
def test_unreadable_files(tmp_path, name, make, message):
    path = tmp_path / name
    if make is not None:
        path.write_bytes(make if isinstance(make, bytes) else make.encode())
    assert message in errors(path)


def test_folder_and_permission(tmp_path, monkeypatch):
    (tmp_path / "folder.csv").mkdir()
    assert errors(tmp_path / "folder.csv") == "is not a regular file"
    path = write(tmp_path / "x.jsonl")
    monkeypatch.setattr(tables.os, "access", lambda *_: False)
    assert errors(path) == "no permission to read"


@pytest.mark.parametrize("cut", [1, 8, 60, -1])
def test_truncated_parquet(tmp_path, cut):
    path = write(tmp_path / "x.parquet")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut if cut > 0 else 40])
    assert "damaged or truncated" in errors(path)


def test_parquet_with_a_damaged_page(tmp_path):
    """Random data has no structure that decoding could miss: only the checksum tells."""
    path = tmp_path / "x.parquet"
    texts = np.random.default_rng(0).integers(32, 127, (50_000, 8), dtype=np.uint8)
    table = pa.table({"note": [bytes(text).decode() for text in texts]})
    pq.write_table(
        table, path, row_group_size=10_000, use_dictionary=False, write_page_checksum=True
    )
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = b"a" * 400
    path.write_bytes(bytes(content))
    message = errors(path, ["note"])
    assert "cannot read on after row 20000 (parquet file damaged" in message


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("name", None, "row 2, column 'name': is missing or null"),
        ("note", 3, "row 2, column 'note': 3 is not text"),
        ("note", ["x"] * 90, "is not text"),
        ("note", "x" * 1_000_001, "row 2, column 'note': 1000001 characters; at most 1000000"),
    ],
)
def test_values_of_the_wrong_kind(tmp_path, column, value, message):
    rows = [ROWS[0], {**ROWS[0], column: value}]
    assert message in errors(write(tmp_path / "x.jsonl", rows))


def test_wrong_types_in_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"note": [[1.0, 2.0]]}), path)
    assert errors(path, ["note"]) == "row 1, column 'note': [1.0, 2.0] is not text"
    pq.write_table(pa.table({"note": ["a", None]}), path)
    assert errors(path, ["note"]) == "row 2, column 'note': is missing or null"


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    path.write_text('{"note": "' + "x" * 5000)
    assert errors(path) == "row 1: longer than 1000 bytes"
