"""`python -m data_prep.rows`: the user's own questions and answers."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import rows
from data_prep.command import run

EXAMPLES = [{"q": f"{a} {a + 1}", "a": a + 1, "other": [a]} for a in range(20)]


def write(path, examples):
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(one)}\n" for one in examples))
    elif path.suffix == ".csv":
        path.write_text("q,a\n" + "".join(f"{one['q']},{one['a']}\n" for one in examples))
    else:
        pq.write_table(pa.Table.from_pylist(examples), path)
    return path


def made(*arguments):
    return run(rows.main, [*map(str, arguments), "--question-key", "q", "--answer-key", "a"])


def read(folder):
    return {s: pq.read_table(folder / f"{s}.parquet").to_pylist() for s in ("train", "val")}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_become_verls_and_are_divided_by_the_seed(suffix, tmp_path):
    file = write(tmp_path / f"größte zahl{suffix}", EXAMPLES)
    for name, given in (("a", 0), ("b", 0), ("c", 1)):
        assert made(file, "--val-size", 4, "--seed", given, "--out", tmp_path / name) == 0
    found = read(tmp_path / "a")
    assert found == read(tmp_path / "b") != read(tmp_path / "c")
    assert [len(found["train"]), len(found["val"])] == [16, 4]
    asked = {row["prompt"][0]["content"]: row for row in (*found["train"], *found["val"])}
    assert asked.keys() == {one["q"] for one in EXAMPLES}
    assert asked["3 4"]["reward_model"] == {"style": "rule", "ground_truth": "4"}
    assert {row["data_source"] for row in asked.values()} == {"größte zahl"}
    assert {"prepared.json", "train.parquet", "val.parquet"} == {
        path.name for path in (tmp_path / "a").iterdir()
    }


def test_a_file_for_validation_a_system_message_and_a_name(tmp_path):
    train, val = write(tmp_path / "t.csv", EXAMPLES[:9]), write(tmp_path / "v.jsonl", EXAMPLES[7:])
    given = ("--val-file", val, "--system", "Be brief.", "--data-source", "larger")
    assert made("--source", train, *given, "--out", tmp_path) == 0
    found = read(tmp_path)
    # What is for validation is not trained on.
    assert [len(found["train"]), len(found["val"])] == [7, 13]
    assert found["val"][0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert found["val"][0]["data_source"] == "larger"


def test_a_csv_file_is_text(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('q,a\n7,007\n"1,\n2",3.0\n')
    assert made(file, "--out", tmp_path) == 0
    found = [row for part in read(tmp_path).values() for row in part]
    truths = {row["prompt"][0]["content"]: row["reward_model"]["ground_truth"] for row in found}
    assert truths == {"7": "007", "1,\n2": "3.0"}


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"q": "x"}, "a"),
        ({"q": "x", "a": None}, "a"),
        ({"q": "x", "a": " "}, "a"),
        ({"q": "x", "a": ["1"]}, "a"),
        ({"q": "x", "a": True}, "a"),
        ({"q": "x", "a": float("nan")}, "a"),
        ({"q": 3, "a": "1"}, "q"),
        ({"a": "1"}, "q"),
        ({"q": "3 4", "a": "5"}, "a"),
    ],
)
def test_a_row_that_lacks_something_is_named_and_nothing_is_written(row, column, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [*EXAMPLES, row])
    assert made(file, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: row 21, column '{column}': ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "none.jsonl: cannot be read"),
        (["rows.txt"], "must end in one of .parquet, .jsonl, .csv"),
        (["rows.csv", "--val-size", "20"], "train.parquet: the split would have no rows"),
        (["rows.csv", "--val-size", "21"], "--val-size: 21 rows are asked for, 20 are there"),
    ],
)
def test_what_cannot_be_divided_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.csv", EXAMPLES)
    assert made(*arguments, "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, capsys):
    file = write(tmp_path / "rows.csv", EXAMPLES)
    assert run(rows.main, [str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{file}: has the column 'question' 0 times, not once; has 'q', 'a'" in error


@pytest.mark.parametrize("files", [[], ["a.csv", "--source", "b.csv"]])
def test_one_file_is_needed(files):
    with pytest.raises(SystemExit) as left:
        made(*files, "--out", "out")
    assert left.value.code == 2
