import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.command import run
from data_prep.countdown import __main__ as countdown
from data_prep.countdown.puzzles import PROMPTS
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


@pytest.mark.parametrize("prompt", ["chat", "tiny"])
def test_no_prompt_holds_an_answer(prompt):
    messages = PROMPTS[prompt]([1, 2, 3], 1)
    assert [m["role"] for m in messages] == (["system"] if prompt == "chat" else []) + ["user"]
    text = messages[-1]["content"]
    assert compute_score("c", text, {"target": 1, "numbers": [1, 2, 3]})["format"] == 0
    if prompt == "chat":
        assert text.endswith("<answer>expression</answer>")


@pytest.mark.parametrize(("numbers", "prompt"), [(3, "tiny"), (4, "chat")])
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
            assert ("expert" in info) == (split == "train")
            if split == "train":
                assert compute_score("c", info["expert"], truth)["score"] == 1
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
        "task": "countdown", "prompt": "chat", "numbers": 3, "seed": 0,
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
