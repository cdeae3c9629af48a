import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from data_prep.command import run
from data_prep.countdown import __main__ as countdown
from data_prep.countdown import sources as countdown_sources
from data_prep.countdown.prompts import PROMPTS
from hpo_verl.rewards.countdown import compute_score

GOLDEN = Path(__file__).with_name("golden") / "countdown_prompts.json"


def command(*arguments):
    """Run the command in this process and return its exit code."""
    try:
        return run(countdown.main, [str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def key(row):
    truth = row["reward_model"]["ground_truth"]
    return tuple(sorted(truth["numbers"])), truth["target"]


def rows(out, split):
    return pq.read_table(out / f"{split}.parquet").to_pylist()


def refused(capsys, *arguments):
    """Check that the command ends with exit code 2 and one line, and return the line."""
    assert command(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()))
def test_golden_prompts(case):
    assert PROMPTS[case["prompt"]](case["numbers"], case["target"]) == case["messages"]


@pytest.mark.parametrize("prompt", ["chat", "base", "tiny"])
def test_no_prompt_holds_an_answer(prompt):
    messages = PROMPTS[prompt]([1, 2, 3], 1)
    assert [m["role"] for m in messages] == (["system"] if prompt == "chat" else []) + ["user"]
    text = messages[-1]["content"]
    assert compute_score("c", text, {"target": 1, "numbers": [1, 2, 3]})["format"] == 0
    if prompt == "chat":
        assert text.endswith("<answer>expression</answer>")


@pytest.mark.parametrize(("numbers", "prompt"), [(3, "tiny"), (4, "chat"), (3, "base")])
def test_generated_files(tmp_path, capsys, numbers, prompt):
    sizes = (40, 10)
    assert (
        command("--numbers", numbers, "--train-size", sizes[0], "--val-size", sizes[1], "--seed", 3,
                "--prompt", prompt, "--out", tmp_path / "d")
        == 0
    )  # fmt: skip
    assert f"{sizes[0]} puzzles" in capsys.readouterr().out
    keys = []
    for split, size in zip(("train", "val"), sizes, strict=True):
        table = rows(tmp_path / "d", split)
        assert len(table) == size
        for index, row in enumerate(table):
            info, truth = row["extra_info"], row["reward_model"]["ground_truth"]
            assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
            assert row["data_source"] == "countdown"
            assert row["reward_model"]["style"] == "rule"
            assert (info["split"], info["index"]) == (split, index)
            assert info["numbers"] == truth["numbers"]
            assert len(info["numbers"]) == numbers
            assert info["difficulty"] >= 1
            assert row["prompt"] == PROMPTS[prompt](truth["numbers"], truth["target"])
            assert info["solution"] not in json.dumps(row["prompt"])
            assert compute_score("c", f"<answer>{info['solution']}</answer>", truth)["score"] == 1
        keys += map(key, table)
    assert len(set(keys)) == len(keys)


def test_same_seed_same_bytes_in_another_process(tmp_path):
    arguments = ["--train-size", "200", "--val-size", "50", "--numbers", "4", "--seed", "9"]
    assert command(*arguments, "--out", tmp_path / "a") == 0
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.countdown", *arguments, "--out", str(tmp_path / "b")],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "train.parquet: 200 puzzles" in done.stdout
    assert "solving" in done.stderr
    assert command(*arguments[:-1], "10", "--out", tmp_path / "c") == 0
    for split in ("train", "val"):
        contents = [(tmp_path / d / f"{split}.parquet").read_bytes() for d in "abc"]
        assert contents[0] == contents[1] != contents[2]


def test_ranges(tmp_path):
    ranges = {"min-number": 2, "max-number": 6, "min-target": 30, "max-target": 35}
    flags = [part for flag, value in ranges.items() for part in (f"--{flag}", value)]
    assert command("--train-size", 5, "--val-size", 5, *flags, "--out", tmp_path) == 0
    for numbers, target in map(key, rows(tmp_path, "train") + rows(tmp_path, "val")):
        assert numbers[0] >= 2
        assert numbers[-1] <= 6
        assert 30 <= target <= 35
    provenance = json.loads(pq.read_schema(tmp_path / "val.parquet").metadata[b"hpo_verl"])
    assert provenance == {
        "task": "countdown", "prompt": "chat", "numbers": 3, "source": "generate", "seed": 0,
        "train_size": 5, "val_size": 5, "min_number": 2, "max_number": 6, "min_target": 30,
        "max_target": 35, "operators": "+-*/",
    }  # fmt: skip


def test_ground_truth_survives_both_ways_of_reading_parquet(tmp_path):
    import datasets

    assert command("--train-size", 20, "--val-size", 1, "--out", tmp_path) == 0
    file = str(tmp_path / "train.parquet")
    loaded = datasets.load_dataset("parquet", data_files=file, cache_dir=str(tmp_path / "cache"))
    frame = pq.read_table(file).to_pandas()  # nested lists as numpy arrays
    for a, (_, b) in zip(loaded["train"], frame.iterrows(), strict=True):
        response = f"<answer>{a['extra_info']['solution']}</answer>"
        for row in (a, b):
            truth = row["reward_model"]["ground_truth"]
            assert compute_score("c", response, truth, row["extra_info"])["score"] == 1
            assert compute_score("c", "<answer>1</answer>", truth)["reason"] == "wrong_numbers"


FILE_ROWS = [
    {"nums": [3, 7, 2], "target": 20},
    {"nums": [1, 2, 3, 4], "target": 10},
    {"nums": [8, 3, 5], "target": 16},
    {"nums": [2, 3, 7], "target": 20},  # the first again, in another order
    {"nums": [9, 5, 1], "target": 15},
    {"nums": [6, 2, 4], "target": 12},
]


def table(path, rows=FILE_ROWS):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_local_file_is_filtered_and_split_by_row_order(tmp_path, capsys, suffix):
    path = table(tmp_path / f"mine.{suffix}")
    out = tmp_path / "d"
    assert (
        command("--source", path, "--numbers", 3, "--train-size", 2, "--val-size", 3, "--out", out)
        == 0
    )
    # The first row is left out of train: val has it in another order.
    assert [key(row)[1] for row in rows(out, "train")] == [16]
    assert [row["extra_info"]["numbers"] for row in rows(out, "val")] == [
        [2, 3, 7], [9, 5, 1], [6, 2, 4],
    ]  # fmt: skip
    assert "left out of train: 1 rows" in capsys.readouterr().out
    assert all(
        compute_score("c", f"<answer>{row['extra_info']['solution']}</answer>",
                      row["reward_model"]["ground_truth"])["score"] == 1
        for row in rows(out, "val")
    )  # fmt: skip


def test_hub_file_keeps_tinyzeros_split(tmp_path, monkeypatch, capsys):
    assert (countdown_sources.TRAIN_ROWS, countdown_sources.VAL_ROWS) == (327_680, 1_024)
    monkeypatch.setattr(countdown_sources, "TRAIN_ROWS", 3)
    monkeypatch.setattr(countdown_sources, "VAL_ROWS", 3)
    path = table(tmp_path / "hub.parquet")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *args, **kwargs: asked.append((args, kwargs)) or str(path),
    )
    assert command("--source", "hub", "--numbers", 3, "--out", tmp_path / "all") == 0
    assert [key(row)[1] for row in rows(tmp_path / "all", "train")] == [16]
    assert [key(row)[1] for row in rows(tmp_path / "all", "val")] == [20, 15, 12]
    assert asked == [
        (
            ("Jiayi-Pan/Countdown-Tasks-3to4", "data/train-00000-of-00001.parquet"),
            {"repo_type": "dataset", "revision": countdown_sources.HUB_REVISION},
        )
    ]
    assert len(countdown_sources.HUB_REVISION) == 40
    other = "0123456789abcdef" * 2 + "01234567"
    pinned = ("--source", "hub", "--numbers", 3, "--revision", other, "--out", tmp_path / "pinned")
    assert command(*pinned) == 0
    assert asked.pop()[1]["revision"] == other
    metadata = json.loads(pq.read_schema(tmp_path / "pinned" / "val.parquet").metadata[b"hpo_verl"])
    assert metadata["revision"] == other
    metadata = json.loads(pq.read_schema(tmp_path / "all" / "val.parquet").metadata[b"hpo_verl"])
    assert metadata["revision"] == countdown_sources.HUB_REVISION
    arguments = ("--source", "hub", "--numbers", 3, "--out", tmp_path / "some")
    assert command(*arguments, "--val-size", 1, "--train-size", 1) == 0
    assert [key(row)[1] for row in rows(tmp_path / "some", "val")] == [20]
    capsys.readouterr()
    assert "3 puzzles of 3 numbers for the val split, but 4 wanted" in refused(
        capsys, *arguments, "--val-size", 4
    )
    nothing = ("--source", "hub", "--numbers", 4, "--out", tmp_path / "none")
    assert "0 puzzles of 4 numbers for the val split, but at least 1 wanted" in refused(
        capsys, *nothing
    )
    monkeypatch.setattr(countdown_sources, "TRAIN_ROWS", 5)
    monkeypatch.setattr(countdown_sources, "VAL_ROWS", 1)
    assert command(*arguments, "--train-size", 2) == 0
    assert [key(row)[1] for row in rows(tmp_path / "some", "train")] == [20, 16]
    capsys.readouterr()
    assert "4 puzzles of 3 numbers for the train split, but 5 wanted" in refused(
        capsys, *arguments, "--train-size", 5
    )


@pytest.mark.parametrize("revision", ["main", "v1.0", "0123456", "A" * 40])
def test_a_revision_is_a_full_commit(tmp_path, capsys, revision):
    arguments = ("--source", "hub", "--revision", revision, "--out", tmp_path / "d")
    message = f"--revision: {revision!r} is not a commit (40 hexadecimal digits)"
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_revision_is_for_the_hub(tmp_path, capsys):
    line = refused(capsys, "--revision", "a" * 40, "--out", tmp_path / "d")
    assert "--revision works with --source hub only" in line


def test_hub_out_of_reach(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot find the file\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    line = refused(capsys, "--source", "hub", "--out", tmp_path / "d")
    assert "cannot be fetched: cannot find the file." in line
    assert "--source PATH" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"nums": [1, 1, 1], "target": 50}, "row 3, column 'target': 50 cannot be reached with [1"),
        ({"nums": [1, 2, 3], "target": 0}, "row 3, column 'target': 0 is below 1"),
        ({"nums": [1, 2, -3], "target": 5}, "row 3, column 'nums': -3 is not from 1 to 4096"),
        ({"nums": [1, 2, 0], "target": 5}, "row 3, column 'nums': 0 is not from 1 to 4096"),
        ({"nums": [1, 2, 3.5], "target": 5}, "row 3, column 'nums': 3.5 is not an integer"),
        ({"nums": [1, 2, 10**7], "target": 5}, "row 3, column 'nums': 10000000 is not from"),
        ({"nums": "123", "target": 5}, "row 3, column 'nums': '123' is not a list"),
        ({"nums": [1, 2, 3], "target": None}, "row 3, column 'target': is missing or null"),
        ({"nums": [1, 2, 3]}, "row 3: column 'target' is missing"),
        ({"nums": [1, 2, 3], "target": 2**62}, "row 3, column 'target': 4611686018427387904 can"),
    ],
)
def test_bad_rows_of_a_local_file(tmp_path, capsys, row, message):
    path = table(tmp_path / "mine.jsonl", [FILE_ROWS[0], FILE_ROWS[1], row, *FILE_ROWS[4:]])
    line = refused(
        capsys, "--source", path, "--train-size", 2, "--val-size", 2, "--out", tmp_path / "d"
    )
    assert line.startswith(f"{path}: {message}")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--numbers", "5"], "argument --numbers: invalid choice: 5"),
        (["--numbers", "three"], "argument --numbers: invalid int value: 'three'"),
        (["--train-size", "0"], "argument --train-size: '0' is not an integer from 1 to 5000000"),
        (["--val-size", "-3"], "argument --val-size: '-3' is not an integer from 1"),
        (["--seed", "1.5"], "argument --seed: '1.5' is not an integer from 0 to 4294967295"),
        (["--prompt", "poem"], "argument --prompt: invalid choice: 'poem'"),
        (["--min-number", "5", "--max-number", "4"], "min_number is 5 and max_number is 4"),
        (["--max-number", "100000"], "3 numbers from 1 to 100000 make too many"),
        (["--max-number", "5", "--train-size", "9999"], "puzzles wanted, but only"),
        (["--source", "nowhere.parquet"], "nowhere.parquet: no such file"),
        (["--source", "hubb"], "hubb: a file name must end in one of"),
        (["--source", "hub", "--max-number", "9"], "--max-number works with --source generate"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    line = refused(capsys, "--out", tmp_path / "d", *arguments)
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_bad_places(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "is a file; a folder is needed" in refused(capsys, "--out", tmp_path / "file" / "d")
    assert "the following arguments are required: --out" in refused(capsys)
    path = table(tmp_path / "mine.jsonl")
    line = refused(capsys, "--source", path, "--out", tmp_path / "d")
    assert "has 6 rows, fewer than the 328704 of TinyZero's split" in line
    line = refused(
        capsys, "--source", path, "--train-size", 4, "--val-size", 4, "--out", tmp_path / "d"
    )
    assert line == f"{path}: 1 puzzles of 3 numbers for the val split, but 4 wanted"
