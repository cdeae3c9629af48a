import json
import os
import stat
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep import command, splits
from data_prep.command import check_output
from data_prep.splits import verl_row, write_splits
from hpo_verl.errors import DataError

MADE = {"seed": 1}


def row(index, text="hi"):
    return verl_row("x", [{"role": "user", "content": text}], "y", "C1", {"index": index})


def test_rows_come_back_and_bytes_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "_ROW_GROUP", 2)
    made = [
        write_splits(
            tmp_path / name / "deep",
            {"train": [row(0), row(1), row(2)], "val": (row(3) for _ in range(1))},
            MADE,
        )
        for name in "ab"
    ]
    assert made[0] == {s: tmp_path / "a" / "deep" / f"{s}.parquet" for s in ("train", "val")}
    assert pq.read_table(made[0]["train"]).to_pylist() == [row(0), row(1), row(2)]
    file = pq.ParquetFile(made[0]["train"])
    assert file.num_row_groups == 2
    assert json.loads(file.schema_arrow.metadata[b"hpo_verl"]) == MADE
    for split in ("train", "val"):
        assert made[0][split].read_bytes() == made[1][split].read_bytes()
    names = ["prepared.json", "train.parquet", "val.parquet"]
    assert sorted(os.listdir(tmp_path / "a" / "deep")) == names
    # An ordinary file, readable by whomever the user's umask allows.
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(made[0]["val"].stat().st_mode) == 0o666 & ~mask


def test_our_files_carry_checksums(tmp_path):
    """A flipped bit anywhere in the pages of a text column is seen when that is read."""
    texts = [{"text": os.urandom(99).hex()} for _ in range(99)]
    path = write_splits(tmp_path, {"val": texts}, {})["val"]
    content = path.read_bytes()
    for place in range(100, 9_000, 150):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(OSError, match=r"checksum|CRC|deserialize"):
            pq.read_table(path, page_checksum_verification=True)


def full_disk_for(monkeypatch, name):
    """Let a temporary file lead to a device that is always full."""

    class Folder(tempfile.TemporaryDirectory):
        def __enter__(self):
            (Path(self.name) / name).symlink_to("/dev/full")
            return self.name

    monkeypatch.setattr(command.tempfile, "TemporaryDirectory", Folder)


def failing(error):
    yield row(0)
    raise error


@pytest.mark.parametrize("error", [DataError("bad row"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_failure_leaves_nothing_new(tmp_path, error):
    out = tmp_path / "new" / "folder"
    with pytest.raises(type(error)):
        write_splits(out, {"train": [row(0)], "val": failing(error)}, MADE)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_what_was_there(tmp_path):
    write_splits(tmp_path, {"train": [row(0)], "val": [row(1)]}, MADE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError):
        write_splits(tmp_path, {"train": [row(5)], "val": failing(DataError("x"))}, MADE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_splits(tmp_path, {"train": [row(5)], "val": [row(1)]}, MADE)
    assert pq.read_table(tmp_path / "train.parquet").to_pylist() == [row(5)]


@pytest.mark.parametrize("text", ["short", "long and incompressible"])
def test_disk_full(tmp_path, monkeypatch, text):
    texts = [os.urandom(200).hex() for _ in range(20_000)] if text.startswith("long") else [text]
    full_disk_for(monkeypatch, "val.parquet")
    val = [row(i, t) for i, t in enumerate(texts)] * 2
    with pytest.raises(DataError, match=r"val\.parquet: cannot be written: no space left on the"):
        write_splits(tmp_path, {"train": [row(0)], "val": val}, MADE)
    assert list(tmp_path.iterdir()) == []


def test_split_without_rows(tmp_path):
    with pytest.raises(DataError, match=r"val\.parquet: the split would have no rows"):
        write_splits(tmp_path / "x", {"train": [row(0)], "val": []}, MADE)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    for out in (file, file / "below"):
        with pytest.raises(DataError, match="is a file; a folder is needed"):
            check_output(out)
        with pytest.raises(DataError, match="cannot be written"):
            write_splits(out, {"train": [row(0)]}, MADE)
    assert file.read_text() == "x"
    (tmp_path / "taken" / "val.parquet").mkdir(parents=True)
    with pytest.raises(DataError, match=r"val\.parquet: is a folder"):
        write_splits(tmp_path / "taken", {"train": [row(0)], "val": [row(0)]}, MADE)
    assert os.listdir(tmp_path / "taken") == ["val.parquet"]
    check_output(tmp_path / "not" / "yet")
    monkeypatch.setattr(command.os, "access", lambda *_: False)
    with pytest.raises(DataError, match="no permission to write in"):
        check_output(tmp_path / "not" / "yet")
