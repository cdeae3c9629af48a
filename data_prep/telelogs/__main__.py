r"""Write TeleLogs, or its synthetic twin, as parquet for verl.

    python -m data_prep.telelogs --source synthetic --out data/telelogs
    python -m data_prep.telelogs --source hub --out ~/telelogs
    python -m data_prep.telelogs --source train.jsonl --val-source test.jsonl --out ~/telelogs

Synthetic rows have data_source `telelogs_synthetic`, real ones `telelogs`. Of the former, those for
training have the simulator's answer as a response to imitate, `extra_info.expert`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.command import CommandParser, check_output, commit, integer_in, progress_bar, run
from data_prep.examples import Example, choose
from data_prep.splits import Row, verl_row, write_splits
from data_prep.telelogs.prompt import expert_answer, render, tiny_prompt
from data_prep.telelogs.simulator import simulate
from data_prep.telelogs.sources import (
    check_outside_repositories,
    read_file,
    read_hub,
)
from hpo_verl.rewards.telelogs import CAUSES

REAL, SYNTHETIC = "telelogs", "telelogs_synthetic"
# The sizes of the dataset's own splits.
SYNTHETIC_SIZES = {"train": 2400, "val": 864}
SPLITS = ("train", "val")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    parser = make_parser()
    options = parser.parse_args(argv)
    synthetic, hub = options.source == "synthetic", options.source == "hub"
    if options.prompt == "tiny" and not synthetic:
        parser.error("--prompt tiny needs --source synthetic")
    if options.val_source and (synthetic or hub):
        parser.error("--val-source needs a file as --source")
    if options.revision and not hub:
        parser.error("--revision needs --source hub")
    check_output(options.out)
    sizes: dict[str, int | None] = {"train": options.train_size, "val": options.val_size}
    revision: str | None = None
    if synthetic:
        counts = {split: size or SYNTHETIC_SIZES[split] for split, size in sizes.items()}
        examples = {
            split: synthetic_rows(split, count, options.seed, options.prompt)
            for split, count in counts.items()
        }
    else:
        check_outside_repositories(options.out)
        if hub:
            read, revision = read_hub(options.revision)
            print(f"read at commit {revision} (--revision takes it)", file=sys.stderr)
        else:
            files = {"train": options.source, "val": options.val_source}
            read = {split: read_file(file) for split, file in files.items() if file}
        examples = choose(read, sizes, options.seed)
        counts = {split: len(rows) for split, rows in examples.items()}
    data_source = SYNTHETIC if synthetic else REAL
    asked = {
        "task": data_source,
        "source": options.source if synthetic or hub else "file",
        "revision": revision,
        "seed": options.seed,
        "prompt": options.prompt,
        **{f"{split}_size": count for split, count in counts.items()},
    }
    with progress_bar() as progress:
        rows = {
            split: progress.track(
                _verl_rows(read, split, data_source, options.prompt),
                counts[split],
                description=split,
            )
            for split, read in examples.items()
        }
        paths = write_splits(options.out, rows, asked)
    for split, path in paths.items():
        print(f"{path}: {counts[split]} rows")


def synthetic_rows(split: str, count: int, seed: int, prompt: str = "full") -> Iterator[Example]:
    """Yield simulated questions with balanced causes; same arguments, same rows.

    Args:
        split: "train" or "val"; they share no drive.
        count: Number of rows; every eight in a row have the eight causes.
        seed: Non-negative.
        prompt: "full", or "tiny" for the compressed form.
    """
    stream = SPLITS.index(split)
    causes = np.random.default_rng([seed, stream])
    block: list[str] = []
    for index in range(count):
        if index % len(CAUSES) == 0:
            block = causes.permutation(CAUSES).tolist()
        cause = block[index % len(CAUSES)]
        drive = simulate((seed, stream, index), cause)
        question = tiny_prompt(drive) if prompt == "tiny" else render(drive)
        yield Example(question, cause)


def _verl_rows(
    examples: Iterable[Example], split: str, data_source: str, form: str
) -> Iterator[Row]:
    for index, example in enumerate(examples):
        prompt = [{"role": "user", "content": example.question}]
        extra_info: dict[str, Any] = {"split": split, "index": index}
        if data_source == SYNTHETIC and split == "train":
            extra_info["expert"] = expert_answer(example.answer, form)
        yield verl_row(data_source, prompt, "root_cause_analysis", example.answer, extra_info)


def make_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(
        prog="python -m data_prep.telelogs",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    rows = integer_in(1, 10_000_000)
    sources = "synthetic | hub (gated; token in HF_TOKEN) | a .parquet, .jsonl or .csv file with "
    add("--source", required=True, help=sources + "the columns question and answer")
    add("--val-source", help="a second such file, for validation")
    add("--revision", type=commit, help="commit of the hub's dataset (default: the newest)")
    add("--train-size", type=rows, help="rows (default: 2400 synthetic, else all)")
    add("--val-size", type=rows, help="rows (default: 864 synthetic, else all)")
    add("--seed", type=integer_in(0, 2**63 - 1), default=0)
    add("--out", required=True, type=Path, help="folder of the two parquet files")
    compressed = (
        "tiny: nine letters instead of the tables, for the tiny CPU policy (synthetic only)"
    )
    add("--prompt", choices=("full", "tiny"), default="full", help=compressed)
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
