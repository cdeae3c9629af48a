"""Make the Countdown data set in verl's schema: `python -m data_prep.countdown --out DIR`.

Each row has `data_source` "countdown", the `prompt` as chat messages, and

- `reward_model.ground_truth`: {"target": int, "numbers": [int, ...]};
- `extra_info`: `split`, `index` (row in its file), `numbers` (in the order of the
  prompt), `difficulty` (how many expression trees solve it, see `trees.py`)
  and `solution` (one of them; the prompt does not show it).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

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
_RANGE_FLAGS = ("min_number", "max_number", "min_target", "max_target", "operators")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    options = _parser().parse_args(argv)
    generated, hub = options.source == "generate", options.source == "hub"
    given = {flag: value for flag in _RANGE_FLAGS if (value := getattr(options, flag)) is not None}
    if options.revision and not hub:
        raise ConfigError("--revision works with --source hub only")
    if given and not generated:
        flag = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{flag} works with --source generate only; the file has its own range")
    ranges = Ranges(options.numbers, **given)
    sizes = options.train_size, options.val_size
    if generated:
        sizes = sizes[0] or DEFAULT_TRAIN_SIZE, sizes[1] or DEFAULT_VAL_SIZE
    asked: dict[str, Any] = {
        "task": DATA_SOURCE,
        "prompt": options.prompt,
        "numbers": options.numbers,
        "source": options.source,
        "train_size": sizes[0],
        "val_size": sizes[1],
        "seed": options.seed,
    }
    check_output(options.out)
    left_out = 0
    with progress_bar() as progress:
        solving = progress.add_task("solving", total=None)

        def show(done: int, total: int) -> None:
            progress.update(solving, completed=done, total=total)

        if generated:
            asked |= {flag: getattr(ranges, flag) for flag in _RANGE_FLAGS}
            puzzles = sample_puzzles(
                sum(sizes),
                ranges,
                options.seed,
                lambda found: progress.update(solving, completed=found),
            )
            splits = {"train": puzzles[: sizes[0]], "val": puzzles[sizes[0] :]}
        else:
            path = Path(options.source)
            if hub:
                asked["revision"] = options.revision or HUB_REVISION
                path = download(asked["revision"])
            train, val, left_out = read_splits(path, options.numbers, *sizes, show)
            splits = {"train": train, "val": val}
        writing = progress.add_task("writing", total=sum(map(len, splits.values())))
        paths = write_splits(
            options.out,
            verl_schema(_GROUND_TRUTH, _EXTRA_INFO, {"hpo_verl": json.dumps(asked)}),
            {split: _rows(splits[split], split, options.prompt) for split in splits},
            lambda rows: progress.advance(writing, rows),
        )
    for split, path in paths.items():
        difficulty = sorted(puzzle.difficulty for puzzle in splits[split])
        print(
            f"{path}: {len(difficulty)} puzzles, solutions per puzzle: "
            f"median {difficulty[len(difficulty) // 2]}, range {difficulty[0]}-{difficulty[-1]}"
        )
    if left_out:
        print(f"left out of train: {left_out} rows that are also in val, up to order")


def _rows(puzzles: Sequence[Puzzle], split: str, prompt: str) -> Iterator[Row]:
    for index, puzzle in enumerate(puzzles):
        numbers = list(puzzle.numbers)
        yield {
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


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m data_prep.countdown",
        description="Write train.parquet and val.parquet of the Countdown task in verl's schema.",
    )
    add = parser.add_argument
    add(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for the two files, made if missing",
    )
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
