r"""Write the user's own questions and answers as parquet for verl.

    python -m data_prep.rows FILE.jsonl --question-key question --answer-key answer --out DIR

FILE is .jsonl, .csv or .parquet. A question becomes a user's message, its answer the ground truth,
a text. A row without one of them is refused, one that repeats a question is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.command import CommandParser, check_output, integer_in, run
from data_prep.examples import Example, choose, read_examples
from data_prep.splits import Row, verl_row, write_splits


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    parser = make_parser()
    options = parser.parse_args(argv)
    file = options.file or options.source
    if not file or (options.file and options.source):
        parser.error("one FILE is needed")
    check_output(options.out)
    files = {"train": file, "val": options.val_file}
    keys = (options.question_key, options.answer_key)
    read = {split: read_examples(path, *keys) for split, path in files.items() if path}
    examples = choose(read, {"train": None, "val": options.val_size}, options.seed)
    name = options.data_source or Path(file).stem
    rows = {
        split: _verl_rows(part, split, name, options.system) for split, part in examples.items()
    }
    asked = {
        "task": name,
        "source": Path(file).name,
        "seed": options.seed,
        "system": options.system,
        **{f"{split}_size": len(part) for split, part in examples.items()},
    }
    for split, path in write_splits(options.out, rows, asked).items():
        print(f"{path}: {len(examples[split])} rows")


def _verl_rows(
    examples: Iterable[Example], split: str, data_source: str, system: str | None
) -> Iterator[Row]:
    first = [{"role": "system", "content": system}] if system else []
    for index, example in enumerate(examples):
        prompt = [*first, {"role": "user", "content": example.question}]
        extra_info = {"split": split, "index": index}
        yield verl_row(data_source, prompt, "own", example.answer, extra_info)


def make_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(
        prog="python -m data_prep.rows",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="a .jsonl, .csv or .parquet file")
    # In a recipe, whose arguments all have names.
    add("--source", metavar="FILE", help="FILE under a name, as recipes give it")
    add("--val-file", metavar="FILE", help="a second such file, for validation")
    add("--question-key", default="question", metavar="COLUMN", help="(question)")
    add("--answer-key", default="answer", metavar="COLUMN", help="(answer)")
    add("--val-size", type=integer_in(1, 10_000_000), help="rows (default: a tenth; all of a file)")
    add("--seed", type=integer_in(0, 2**63 - 1), default=0, help="of the division (0)")
    add("--system", metavar="TEXT", help="a system message before every question")
    add("--data-source", metavar="NAME", help="the task's name (default: that of the file)")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the two parquet files")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
