"""Make the Countdown data set in verl's schema: `python -m data_prep.countdown --out DIR`.

Each row has `data_source` "countdown", the `prompt` as chat messages, and

- `reward_model.ground_truth`: {"target": int, "numbers": [int, ...]};
- `extra_info`: `split`, `index` (row in its file), `numbers` (in the order of the
  prompt), `difficulty` (how many expression trees solve it, see `trees.py`),
  `solution` (one of them; the prompt does not show it) and, for training, `expert` (it, worked
  out, as a response to imitate).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_prep.command import CommandParser, check_output, integer_in, progress_bar, run
from data_prep.countdown.puzzles import (
    OPERATORS,
    PROMPTS,
    Puzzle,
    Ranges,
    sample_puzzles,
    worked,
)
from data_prep.countdown.trees import SIZES
from data_prep.splits import Row, verl_row, write_splits

DATA_SOURCE = "countdown"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    options = vars(make_parser().parse_args(argv))
    out, train_size = options.pop("out"), options["train_size"]
    ranges = Ranges(**{field.name: options[field.name] for field in fields(Ranges)})
    check_output(out)
    count = train_size + options["val_size"]
    with progress_bar() as progress:
        bar = progress.add_task("solving", total=count)
        puzzles = sample_puzzles(
            count, ranges, options["seed"], lambda found: progress.update(bar, completed=found)
        )
    splits = {"train": puzzles[:train_size], "val": puzzles[train_size:]}
    rows = {split: _rows(part, split, options["prompt"]) for split, part in splits.items()}
    paths = write_splits(out, rows, {"task": DATA_SOURCE, **options})
    for split, path in paths.items():
        difficulty = sorted(puzzle.difficulty for puzzle in splits[split])
        print(
            f"{path}: {len(difficulty)} puzzles, solutions per puzzle: "
            f"median {difficulty[len(difficulty) // 2]}, range {difficulty[0]}-{difficulty[-1]}"
        )


def _rows(puzzles: Sequence[Puzzle], split: str, prompt: str) -> Iterator[Row]:
    for index, puzzle in enumerate(puzzles):
        numbers = list(puzzle.numbers)
        extra_info: dict[str, Any] = {
            "split": split,
            "index": index,
            "numbers": numbers,
            "difficulty": puzzle.difficulty,
            "solution": puzzle.solution,
        }
        if split == "train":
            extra_info["expert"] = worked(puzzle.solution)
        messages = PROMPTS[prompt](numbers, puzzle.target)
        truth = {"target": puzzle.target, "numbers": numbers}
        yield verl_row(DATA_SOURCE, messages, "math", truth, extra_info)


def make_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(
        prog="python -m data_prep.countdown",
        description="Write train.parquet and val.parquet of the Countdown task in verl's schema: "
        "puzzles sampled uniformly from all solvable ones, without repetition.",
    )
    add = parser.add_argument
    size, bound = integer_in(1, 5_000_000), integer_in(1, 100_000)
    add("--out", required=True, type=Path, metavar="DIR", help="folder, made if missing")
    # The files' metadata have the order of these.
    forms = "chat: instructions; tiny: `3 7 2 = 13`; short: the same and a system message (chat)"
    add("--prompt", choices=tuple(PROMPTS), default="chat", help=forms)
    add("--train-size", type=size, default=50_000, help="(50000)")
    add("--val-size", type=size, default=1_024, help="(1024)")
    add("--seed", type=integer_in(0, 2**32 - 1), default=0, help="(0)")
    add("--numbers", type=int, choices=SIZES, default=3, help="numbers per puzzle (3)")
    for name in ("min_number", "max_number", "min_target", "max_target"):
        flag, default = f"--{name.replace('_', '-')}", getattr(Ranges, name)
        add(flag, type=bound, default=default, help="(%(default)s)")
    add("--operators", default=OPERATORS, help="which suffice for every puzzle (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
