r"""Write TeleLogs, or its synthetic twin, as parquet for verl.

    python -m data_prep.telelogs --source synthetic --out data/telelogs
    python -m data_prep.telelogs --source hub --out ~/telelogs
    python -m data_prep.telelogs --source train.jsonl --val-source test.jsonl --out ~/telelogs

Synthetic rows have data_source `telelogs_synthetic`, real ones `telelogs`.
The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.command import CommandParser, commit, integer_in, progress_bar, run
from data_prep.output import check_output
from data_prep.splits import verl_schema, write_splits
from data_prep.tables import Row
from data_prep.telelogs.prompt import randomise, render
from data_prep.telelogs.simulator import simulate
from data_prep.telelogs.sources import (
    Example,
    check_place,
    choose,
    hub_token,
    read_examples,
    read_hub,
)
from data_prep.telelogs.tiny import tiny_prompt
from hpo_verl.errors import DataError
from hpo_verl.rewards.telelogs import CAUSES

REAL, SYNTHETIC = "telelogs", "telelogs_synthetic"
# The sizes of the dataset's own splits.
SYNTHETIC_SIZES = {"train": 2400, "val": 864}
SPLITS = ("train", "val")
EXTRA_INFO = {
    "split": pa.string(),
    "index": pa.int64(),
    "cause": pa.string(),  # before --randomise
    "randomised": pa.bool_(),
}
LISTED_ROWS = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check_combinations(parser, options)
    check_place(options.out, real=options.source != "synthetic")
    check_output(options.out)
    lengths = _PromptLengths(options.tokenizer, options.max_prompt_length)
    sizes: dict[str, int | None] = {"train": options.train_size, "val": options.val_size}
    revision: str | None = None
    if options.source == "synthetic":
        counts = {split: sizes[split] or SYNTHETIC_SIZES[split] for split in SPLITS}
        rows = {
            split: synthetic_rows(split, counts[split], options.seed, options.prompt)
            for split in SPLITS
        }
        data_source = SYNTHETIC
    else:
        if options.source == "hub":
            examples, revision = read_hub(hub_token(), options.revision)
            print(f"read at commit {revision} (--revision takes it)", file=sys.stderr)
        else:
            examples = {"train": read_examples(options.source)}
            if options.val_source:
                examples["val"] = read_examples(options.val_source)
        chosen = choose(examples, sizes, options.seed)
        counts = {split: len(chosen[split]) for split in SPLITS}
        rows = {split: iter(chosen[split]) for split in SPLITS}
        data_source = REAL
    schema = verl_schema(
        pa.string(),
        EXTRA_INFO,
        {
            "hpo_verl": json.dumps(
                {
                    "task": data_source,
                    "source": options.source if options.source in ("synthetic", "hub") else "file",
                    "revision": revision,
                    "seed": options.seed,
                    "prompt": options.prompt,
                    "randomise": options.randomise,
                    **{f"{split}_size": counts[split] for split in SPLITS},
                }
            )
        },
    )
    with progress_bar() as progress:
        task = progress.add_task("telelogs", total=sum(counts.values()))

        def chunks(split: str) -> Iterator[Row]:
            finished = _verl_rows(
                rows[split], split, data_source, options.seed if options.randomise else None
            )
            for row in finished:
                lengths.measure([row])
                yield row
                progress.advance(task)

        paths = write_splits(options.out, schema, {split: chunks(split) for split in SPLITS})
    for split, path in paths.items():
        print(f"{path}: {counts[split]} rows")
    lengths.report()


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
        yield Example(question, cause, f"{split}: row {index + 1}")


def _verl_rows(
    examples: Iterable[Example], split: str, data_source: str, randomise_seed: int | None
) -> Iterator[Row]:
    for index, example in enumerate(examples):
        question, answer = example.question, example.answer
        if randomise_seed is not None:
            random = np.random.default_rng([randomise_seed, SPLITS.index(split), index, 2])
            try:
                question, answer = randomise(question, answer, random)
            except DataError as error:
                raise DataError(f"{example.place}, column 'question': {error}") from error
        yield {
            "data_source": data_source,
            "prompt": [{"role": "user", "content": question}],
            "ability": "root_cause_analysis",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {
                "split": split,
                "index": index,
                "cause": example.answer,
                "randomised": randomise_seed is not None,
            },
        }


class _PromptLengths:
    """Counts the tokens of prompts and reports those beyond the limit; cuts nothing."""

    def __init__(self, tokenizer: str | None, limit: int | None) -> None:
        self.limit = limit
        self.longest = self.measured = 0
        self.too_long: list[str] = []
        self._tokenizer = _load_tokenizer(tokenizer) if tokenizer else None

    def measure(self, rows: list[Row]) -> None:
        if self._tokenizer is None or self.limit is None:
            return
        for row in rows:
            tokens = self._tokenizer.apply_chat_template(
                row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
            )
            self.measured += 1
            self.longest = max(self.longest, len(tokens))
            if len(tokens) > self.limit:
                extra_info = row["extra_info"]
                self.too_long.append(
                    f"{extra_info['split']} {extra_info['index']} ({len(tokens)} tokens)"
                )

    def report(self) -> None:
        if not self.measured:
            return
        if self.too_long:
            listed = ", ".join(self.too_long[:LISTED_ROWS])
            more = ", ..." if len(self.too_long) > LISTED_ROWS else ""
            print(
                f"warning: {len(self.too_long)} of {self.measured} prompts are longer than "
                f"{self.limit} tokens: {listed}{more}; they were written in full, set "
                f"data.max_prompt_length to {self.longest} or more",
                file=sys.stderr,
            )
        else:
            print(f"longest prompt: {self.longest} tokens, limit {self.limit}", file=sys.stderr)


def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"--tokenizer: {path}: no tokenizer can be read from this folder"
        ) from error
    if not tokenizer.chat_template:
        raise DataError(f"--tokenizer: {path}: has no chat template")
    return tokenizer


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m data_prep.telelogs",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source",
        required=True,
        help="synthetic | hub (gated; token in HF_TOKEN) | a .parquet, .jsonl or .csv file with "
        "the columns question and answer",
    )
    parser.add_argument("--val-source", help="a second such file, for validation")
    parser.add_argument(
        "--revision", type=commit, help="commit of the hub's dataset (default: the newest)"
    )
    rows = integer_in(1, 10_000_000)
    parser.add_argument("--train-size", type=rows, help="rows (default: 2400 synthetic, else all)")
    parser.add_argument("--val-size", type=rows, help="rows (default: 864 synthetic, else all)")
    parser.add_argument("--seed", type=integer_in(0, 2**63 - 1), default=0)
    parser.add_argument("--out", required=True, type=Path, help="folder of the two parquet files")
    parser.add_argument(
        "--prompt",
        choices=("full", "tiny"),
        default="full",
        help="tiny: nine letters instead of the tables, for the tiny CPU policy (synthetic only)",
    )
    parser.add_argument(
        "--randomise",
        action="store_true",
        help="permute the cause numbers and the rows of both tables, question by question",
    )
    parser.add_argument(
        "--max-prompt-length",
        type=integer_in(1, 10_000_000),
        help="report prompts of more tokens than this (never cuts them)",
    )
    parser.add_argument("--tokenizer", help="folder of the tokenizer that counts them")
    return parser


def _check_combinations(parser: CommandParser, options: argparse.Namespace) -> None:
    synthetic, hub = options.source == "synthetic", options.source == "hub"
    if (options.tokenizer is None) != (options.max_prompt_length is None):
        parser.error("--max-prompt-length and --tokenizer need each other")
    if options.prompt == "tiny" and not synthetic:
        parser.error("--prompt tiny needs --source synthetic")
    if options.prompt == "tiny" and options.randomise:
        parser.error("--randomise needs --prompt full: a tiny prompt lists no causes")
    if options.val_source and (synthetic or hub):
        parser.error("--val-source needs a file as --source")
    if options.revision and not hub:
        parser.error("--revision needs --source hub")


if __name__ == "__main__":
    sys.exit(run(main))
