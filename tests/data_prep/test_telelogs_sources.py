"""`python -m data_prep.telelogs` with rows of files and of the hub, and where they may go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from telelogs_helpers import command, questions, refused, rows_of, write_table

from data_prep.telelogs import sources as telelogs_sources

REPOSITORY = Path(__file__).resolve().parents[2]


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_one_file_is_divided_without_overlap(tmp_path: Path, suffix: str) -> None:
    rows = questions(30)
    path = write_table(tmp_path / f"rows{suffix}", [*rows, rows[0], rows[3]])
    assert command("--source", path, "--train-size", 20, "--val-size", 8, "--out", tmp_path) == 0
    train, val = rows_of(tmp_path / "train.parquet"), rows_of(tmp_path / "val.parquet")
    assert {row["data_source"] for row in (*train, *val)} == {"telelogs"}
    answers = {row["question"]: row["answer"] for row in rows}
    seen = [row["prompt"][0]["content"] for row in (*train, *val)]
    assert len(set(seen)) == len(seen) == 28
    for row in (*train, *val):
        assert answers[row["prompt"][0]["content"]] == row["reward_model"]["ground_truth"]


def test_a_tenth_of_an_undivided_file_is_for_validation(tmp_path: Path) -> None:
    path = write_table(tmp_path / "rows.jsonl", questions(30))
    assert command("--source", path, "--out", tmp_path) == 0
    assert len(rows_of(tmp_path / "train.parquet")) == 27
    assert len(rows_of(tmp_path / "val.parquet")) == 3


def test_a_second_file_is_for_validation_and_kept_out_of_training(tmp_path: Path) -> None:
    rows = questions(20)
    train = write_table(tmp_path / "a.jsonl", rows[:14])
    val = write_table(tmp_path / "b.csv", rows[10:])
    out = tmp_path / "out"
    assert command("--source", train, "--val-source", val, "--out", out) == 0
    assert len(rows_of(out / "train.parquet")) == 10
    assert len(rows_of(out / "val.parquet")) == 10


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "why?", "answer": "C9"}, "row 31, column 'answer': 'C9' is not one of"),
        ({"question": "why?", "answer": "3"}, "row 31, column 'answer': '3' is not one of"),
        ({"question": "why?", "answer": ""}, "row 31, column 'answer'"),
        ({"question": "  ", "answer": "C1"}, "row 31, column 'question'"),
        ({"question": "why?", "answer": None}, "row 31, column 'answer'"),
        ({"question": None, "answer": "C1"}, "row 31, column 'question'"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_a_bad_row_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict, message: str, suffix: str
) -> None:
    path = write_table(tmp_path / f"rows{suffix}", [*questions(30), row])
    error = refused(capsys, "--source", path, "--out", tmp_path / "out")
    assert f"{path}: {message}" in error
    assert not (tmp_path / "out").exists()


def test_conflicting_answers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"question": "why?", "answer": "C1"}
    again = {"question": "why? ", "answer": "C2"}
    path = write_table(tmp_path / "rows.csv", [row, again])
    error = refused(capsys, "--source", path, "--out", tmp_path / "out")
    assert f"{path}: row 2, column 'answer': C2, but row 1 has the same" in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.parquet", None, "cannot be read"),
        ("table.txt", b"x", "a file name must end in one of .parquet, .jsonl, .csv"),
        ("a.parquet", b"", "cannot be read (damaged or truncated?)"),
        ("b.parquet", b"PAR1 but not really", "cannot be read (damaged or truncated?)"),
        ("c.jsonl", b'{"question": "x"', "cannot be read (damaged or truncated?)"),
        ("d.jsonl", b"[1]\n", "cannot be read (damaged or truncated?): row 1: is no object"),
        ("k.jsonl", b'{"question":"x","answer":"C1","m":' + b"[" * 100_000, "cannot be read"),
        ("l.jsonl", b'{"answer":"C1","question":"x","answer":"C2"}', "cannot be read"),
        ("m.jsonl", b'\n{"answer":"C1","question":"\\udfff"}', "row 1, column 'question': holds a"),
        ("n.csv", b"question,answer,answer\nx,C1,C2\n", "has the column 'answer' 2 times"),
        ("e.jsonl", b'{"question":"x","answer":"\xff"}\n', "cannot be read"),
        ("f.csv", b"question,answer\n", "has no rows"),
        ("g.csv", b"question,answer\nx,C1,y\n", "cannot be read (damaged or truncated?)"),
        ("h.csv", b"question,answer\nx,\xff\n", "cannot be read (damaged or truncated?)"),
        (
            "i.csv",
            b"question,label\nx,C1\n",
            "has the column 'answer' 0 times, not once; has 'question', 'label'",
        ),
    ],
)
def test_an_unreadable_file_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    error = refused(capsys, "--source", path, "--out", tmp_path / "out")
    assert f"{path}: {message}" in error
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_twice_in_a_parquet_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.parquet"
    columns = [pa.array(["x"]), pa.array(["C1"]), pa.array(["C2"])]
    pq.write_table(pa.Table.from_arrays(columns, ["question", "answer", "answer"]), path)
    error = refused(capsys, "--source", path, "--out", tmp_path / "out")
    assert f"{path}: has the column 'answer' 2 times" in error


def test_columns_that_nobody_needs_may_hold_anything(tmp_path: Path) -> None:
    rows = [{**row, "id": i, "id2": i} for i, row in enumerate(questions(12))]
    path = write_table(tmp_path / "rows.jsonl", [*rows, {**questions(13)[12], "id": "text"}])
    assert len(telelogs_sources.read_file(path)) == 13


def test_a_parquet_file_with_a_damaged_page_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the checksum tells: a letter of an uncompressed question is another."""
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist(questions(3))
    pq.write_table(table, path, use_dictionary=False, compression="none", write_page_checksum=True)
    content = path.read_bytes()
    middle = len(content) // 4
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert f"{path}: cannot be read" in refused(capsys, "--source", path, "--out", tmp_path / "out")


def test_more_rows_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(tmp_path / "rows.csv", questions(10))
    error = refused(capsys, "--source", path, "--train-size", 11, "--out", tmp_path / "out")
    assert "--train-size: 11 rows are asked for, 9 are there" in error


# --- hub ---------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder in the place of the hub's dataset, without a configuration name."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, rows in (("train", questions(12)), ("test", questions(6, prefix="Test. "))):
        (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    real = datasets.load_dataset

    def load_dataset(path, name=None, *, split, revision, token):
        assert (path, revision, token) == ("netop/TeleLogs", COMMIT, "secret")
        # The real function raises its own error for an unknown configuration.
        return real(str(folder), name, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(telelogs_sources, "_newest_commit", lambda token: COMMIT)
    monkeypatch.setenv("HF_TOKEN", "secret")
    return folder


def test_the_hub_is_read_without_a_configuration_name(hub: Path, tmp_path: Path) -> None:
    del hub
    out = tmp_path / "out"
    assert command("--source", "hub", "--out", out) == 0
    assert len(rows_of(out / "train.parquet")) == 12
    val = rows_of(out / "val.parquet")
    assert len(val) == 6
    assert all(row["prompt"][0]["content"].startswith("Test. ") for row in val)
    metadata = json.loads(pq.read_schema(out / "val.parquet").metadata[b"hpo_verl"])
    assert (metadata["source"], metadata["revision"]) == ("hub", COMMIT)
    # The token stays out of the files.
    assert all(b"secret" not in path.read_bytes() for path in out.iterdir())


def test_the_hub_is_read_with_a_configuration_name(hub: Path, tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: troubleshooting\n  data_files:\n"
    card += "  - split: train\n    path: train.json\n  - split: test\n    path: test.json\n---\n"
    (hub / "README.md").write_text(card, encoding="utf-8")
    assert command("--source", "hub", "--revision", COMMIT, "--out", tmp_path / "out") == 0
    assert len(rows_of(tmp_path / "out" / "train.parquet")) == 12


@pytest.mark.parametrize("token", [None, "", "  "])
def test_without_a_token_the_error_says_how_to_get_one(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    error = refused(capsys, "--source", "hub", "--out", tmp_path / "out")
    assert "HF_TOKEN is not set" in error
    assert "https://huggingface.co/datasets/netop/TeleLogs" in error
    assert not (tmp_path / "out").exists()


def test_a_refusal_of_the_hub_is_one_line(
    hub: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del hub

    def load_dataset(*args, **kwargs):
        raise OSError("403 Client Error.\nYour request is awaiting a review.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = refused(capsys, "--source", "hub", "--out", tmp_path / "out")
    assert "403 Client Error" in error
    assert "ask for access" in error
    assert "secret" not in error


@pytest.mark.parametrize("revision", ["main", "v1.0", "0123456", COMMIT.upper()])
def test_a_revision_must_be_a_commit(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], revision: str
) -> None:
    del hub
    arguments = ("--source", "hub", "--revision", revision, "--out", tmp_path / "out")
    with pytest.raises(SystemExit) as left:
        command(*arguments)
    assert left.value.code == 2
    assert "is not a commit" in capsys.readouterr().err


# --- where rows may go -------------------------------------------------------------------------


def git_repository(path: Path) -> Path:
    path.mkdir()
    subprocess.run(["git", "init", "-q", str(path)], check=True)
    (path / ".gitignore").write_text("ignored/\n")
    (path / "tracked").mkdir()
    (path / "tracked" / "file.txt").write_text("x")
    subprocess.run(["git", "-C", str(path), "add", "."], check=True)
    return path


def test_real_rows_go_into_no_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_table(tmp_path / "rows.csv", questions(10))
    repository = git_repository(tmp_path / "repository")
    link = tmp_path / "link"
    link.symlink_to(repository)
    for out in (
        repository,
        repository / "ignored" / "deep",
        repository / "new" / ".." / "other",
        link / "behind",
        REPOSITORY,
        REPOSITORY / "runs" / "telelogs",
    ):
        error = refused(capsys, "--source", rows, "--out", out)
        assert "lies in the repository" in error
    assert not (REPOSITORY / "runs" / "telelogs").exists()
    assert sorted(path.name for path in repository.iterdir()) == [".git", ".gitignore", "tracked"]
