"""Make the Countdown data set in verl's schema: `python -m data_prep.countdown --out DIR`.

Each row has `data_source` "countdown", the `prompt` as chat messages, and

- `reward_model.ground_truth`: {"target": int, "numbers": [int, ...]};
- `extra_info`: `split`, `index` (row in its file), `numbers` (in the order of the
  prompt), `difficulty` (how many expression trees solve it, see `countdown_trees`)
  and `solution` (one of them; the prompt does not show it).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.progress import Progress

from data_prep.command import CommandParser, commit, integer_in, progress_bar, run
from data_prep.countdown.prompts import PROMPTS
from data_prep.countdown.puzzles import Puzzle, Ranges, sample_puzzles
from data_prep.countdown.sources import HUB_REVISION, download, read_splits
from data_prep.countdown.trees import SIZES
from data_prep.output import check_output
from data_prep.splits import verl_schema, write_splits
from data_prep.tables import Row
from hpo_verl.errors import ConfigError

DATA_SOURCE = "countdown"
DEFAULT_TRAIN_SIZE = 50_000
DEFAULT_VAL_SIZE = 1_024

_GROUND_TRUTH = pa.struct([("target", pa.int64()), ("numbers", pa.list_(pa.int64()))])
_EXTRA_INFO = {
    "split": pa.string(),
    "index": pa.int64(),
    "numbers": pa.list_(pa.int64()),
    "difficulty": pa.int64(),
    "solution": pa.string(),
}
_CHUNK = 10_000
_RANGE_FLAGS = ("min_number", "max_number", "min_target", "max_target", "operators")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    arguments = vars(_parser().parse_args(argv))
    out = Path(arguments.pop("out"))
    generated = arguments["source"] == "generate"
    revision = arguments.pop("revision")
    if arguments["source"] == "hub":
        arguments["revision"] = revision or HUB_REVISION
    elif revision:
        raise ConfigError("--revision works with --source hub only")
    given = {flag: arguments.pop(flag) for flag in _RANGE_FLAGS}
    given = {flag: value for flag, value in given.items() if value is not None}
    if given and not generated:
        flag = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{flag} works with --source generate only; the file has its own range")
    if generated:
        arguments["train_size"] = arguments["train_size"] or DEFAULT_TRAIN_SIZE
        arguments["val_size"] = arguments["val_size"] or DEFAULT_VAL_SIZE
    ranges = Ranges(arguments["numbers"], **given)
    check_output(out)
    left_out = 0
    with progress_bar() as progress:
        if generated:
            arguments |= {flag: getattr(ranges, flag) for flag in _RANGE_FLAGS}
            train, val = _generate(
                ranges, arguments["train_size"], arguments["val_size"], arguments["seed"], progress
            )
        else:
            train, val, left_out = _read(arguments, progress)
        splits = {"train": train, "val": val}
        paths = write(out, splits, arguments.pop("prompt"), arguments, progress)
    for split, path in paths.items():
        difficulty = sorted(puzzle.difficulty for puzzle in splits[split])
        print(
            f"{path}: {len(difficulty)} puzzles, solutions per puzzle: "
            f"median {difficulty[len(difficulty) // 2]}, range {difficulty[0]}-{difficulty[-1]}"
        )
    if left_out:
        print(f"left out of train: {left_out} rows that are also in val, up to order")


def write(
    out: Path,
    splits: dict[str, list[Puzzle]],
    prompt: str,
    provenance: dict[str, Any],
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write puzzles as `<out>/<split>.parquet`, all or nothing.

    Args:
        out: Folder.
        splits: Split name -> puzzles.
        prompt: A key of `PROMPTS`.
        provenance: Kept as JSON in the files' metadata under `hpo_verl`.
        progress: A bar to report to.

    Raises:
        DataError: The files cannot be written.
    """
    schema = verl_schema(
        _GROUND_TRUTH,
        _EXTRA_INFO,
        {"hpo_verl": json.dumps({"task": DATA_SOURCE, "prompt": prompt, **provenance})},
    )
    total = sum(map(len, splits.values()))
    bar = progress.add_task("writing", total=total) if progress else None

    def chunks(split: str) -> Iterator[list[Row]]:
        puzzles = splits[split]
        for start in range(0, len(puzzles), _CHUNK):
            part = puzzles[start : start + _CHUNK]
            yield [row(puzzle, split, start + i, prompt) for i, puzzle in enumerate(part)]
            if progress and bar is not None:
                progress.advance(bar, len(part))

    return write_splits(out, schema, {split: chunks(split) for split in splits})


def row(puzzle: Puzzle, split: str, index: int, prompt: str) -> Row:
    """Return one row of verl's schema."""
    numbers = list(puzzle.numbers)
    return {
        "data_source": DATA_SOURCE,
        "prompt": PROMPTS[prompt](numbers, puzzle.target),
        "ability": "math",
        "reward_model": {
            "style": "rule",
            "ground_truth": {"target": puzzle.target, "numbers": numbers},
        },
        "extra_info": {
            "split": split,
            "index": index,
            "numbers": numbers,
            "difficulty": puzzle.difficulty,
            "solution": puzzle.solution,
        },
    }


def _generate(
    ranges: Ranges, train_size: int, val_size: int, seed: int, progress: Progress
) -> tuple[list[Puzzle], list[Puzzle]]:
    bar = progress.add_task("solving", total=train_size + val_size)
    puzzles = sample_puzzles(
        train_size + val_size,
        ranges,
        seed,
        lambda found: progress.update(bar, completed=found),
    )
    return puzzles[:train_size], puzzles[train_size:]


def _read(arguments: dict[str, Any], progress: Progress) -> tuple[list[Puzzle], list[Puzzle], int]:
    path = Path(arguments["source"])
    if arguments["source"] == "hub":
        path = download(arguments["revision"])
    bar = progress.add_task("solving", total=None)
    return read_splits(
        path,
        arguments["numbers"],
        arguments["train_size"],
        arguments["val_size"],
        lambda done, total: progress.update(bar, completed=done, total=total),
    )


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m data_prep.countdown",
        description="Write train.parquet and val.parquet of the Countdown task in verl's schema.",
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for the two files, made if missing")
    add("--numbers", type=int, choices=SIZES, default=3, help="numbers per puzzle (3)")
    add(
        "--source",
        default="generate",
        metavar="generate|hub|PATH",
        help="generate: sampled uniformly from all solvable puzzles, without repetition; "
        "hub: Jiayi-Pan/Countdown-Tasks-3to4 with TinyZero's split; PATH: a .parquet, .jsonl "
        "or .csv file with the columns nums and target (generate)",
    )
    add("--revision", type=commit, help=f"for hub: commit of the data set ({HUB_REVISION})")
    size = integer_in(1, 5_000_000)
    add("--train-size", type=size, help=f"(generate: {DEFAULT_TRAIN_SIZE}; hub: all)")
    add("--val-size", type=size, help=f"(generate: {DEFAULT_VAL_SIZE}; hub: all)")
    add("--seed", type=integer_in(0, 2**32 - 1), default=0, help="for generate (0)")
    add(
        "--prompt",
        choices=tuple(PROMPTS),
        default="chat",
        help="chat: system and user message; base: plain text to continue; "
        "tiny: `3 7 2 = 13`, for the tiny CPU policy (chat)",
    )
    for flag, default in (("number", (1, 99)), ("target", (10, 100))):
        for bound, value in zip(("min", "max"), default, strict=True):
            add(
                f"--{bound}-{flag}",
                type=integer_in(1, 100_000),
                help=f"for generate: {bound} {flag}, inclusive ({value})",
            )
    add(
        "--operators",
        help="for generate: operators that suffice to solve every puzzle (+-*/)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
