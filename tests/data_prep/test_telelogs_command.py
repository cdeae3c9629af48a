"""`python -m data_prep.telelogs`: synthetic rows, prompt lengths, bad arguments."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from telelogs_helpers import command, questions, refused, rows_of, write_table

from data_prep.policies.tokenizer import build_tokenizer
from hpo_verl.rewards.telelogs import CAUSES, compute_score

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- synthetic ---------------------------------------------------------------------------------


def test_synthetic_rows_have_verls_schema_and_score(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    arguments = ("--source", "synthetic", "--train-size", 24, "--val-size", 16, "--seed", 5)
    assert command(*arguments, "--out", out) == 0
    names = ["prepared.json", "train.parquet", "val.parquet"]
    assert sorted(path.name for path in out.iterdir()) == names
    for split, count in (("train", 24), ("val", 16)):
        rows = rows_of(out / f"{split}.parquet")
        assert len(rows) == count
        assert Counter(row["reward_model"]["ground_truth"] for row in rows) == dict.fromkeys(
            CAUSES, count // 8
        )
        for index, row in enumerate(rows):
            assert list(row) == [
                "data_source",
                "prompt",
                "ability",
                "reward_model",
                "extra_info",
            ]
            assert row["data_source"] == "telelogs_synthetic"
            assert [message["role"] for message in row["prompt"]] == ["user"]
            assert row["reward_model"]["style"] == "rule"
            truth = row["reward_model"]["ground_truth"]
            info = row["extra_info"]
            assert {key: info[key] for key in ("split", "index")} == {
                "split": split,
                "index": index,
            }
            assert ("expert" in info) == (split == "train")
            if split == "train":
                assert compute_score("t", info["expert"], truth)["score"] == 1.0
            answer = compute_score(row["data_source"], f"\\boxed{{{truth}}}", truth)
            assert answer["score"] == 1.0
            # The prompt itself is worth nothing.
            assert compute_score("", row["prompt"][0]["content"], truth)["score"] == 0.0


@pytest.mark.parametrize("extra", [(), ("--prompt", "tiny")])
def test_same_arguments_same_bytes(tmp_path: Path, extra: tuple[str, ...]) -> None:
    arguments = ("--source", "synthetic", "--train-size", 40, "--val-size", 8, *extra)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command(*arguments, "--seed", seed, "--out", tmp_path / out) == 0
    for name in ("train.parquet", "val.parquet"):
        a, b, c = ((tmp_path / out / name).read_bytes() for out in "abc")
        assert a == b
        assert a != c


def test_the_size_of_a_split_does_not_change_its_rows(tmp_path: Path) -> None:
    for count in (8, 20):
        arguments = ("--source", "synthetic", "--train-size", count, "--val-size", 8)
        assert command(*arguments, "--out", tmp_path / str(count)) == 0
    few, many = (rows_of(tmp_path / str(count) / "train.parquet") for count in (8, 20))
    assert many[:8] == few


def test_tiny_prompts_are_short(tmp_path: Path) -> None:
    arguments = ("--source", "synthetic", "--prompt", "tiny", "--train-size", 16, "--val-size", 8)
    assert command(*arguments, "--out", tmp_path / "out") == 0
    tokenizer = build_tokenizer()
    for row in rows_of(tmp_path / "out" / "train.parquet"):
        tokens = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert len(tokens) <= 40


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--prompt", "small"), "invalid choice"),
        (("--train-size", 0), "not an integer from 1"),
        (("--train-size", "many"), "not an integer from 1"),
        (("--seed", -1), "not an integer from 0"),
        (("--val-source", "x.csv"), "needs a file"),
        (("--revision", COMMIT), "needs --source hub"),
        (("--colour", "red"), "unrecognized"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: tuple, message: str
) -> None:
    out = tmp_path / "out"
    assert message in refused(capsys, "--source", "synthetic", "--out", out, *extra)
    assert not out.exists()


def test_tiny_prompts_cannot_be_made_of_real_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_table(tmp_path / "rows.csv", questions(3))
    arguments = ("--source", path, "--prompt", "tiny", "--out", tmp_path / "out")
    assert "--prompt tiny needs --source synthetic" in refused(capsys, *arguments)
