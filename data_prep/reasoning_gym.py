"""Write a task of reasoning-gym as parquet for verl: `python -m data_prep.reasoning_gym`.

    python -m data_prep.reasoning_gym --name chain_sum --train-size 10000 --val-size 500 --out DIR
    python -m data_prep.reasoning_gym --name countdown --config '{"max_numbers": 4}' --out DIR

A question appears once, so that none of the validation split is trained on. Each row has
data_source `reasoning_gym_NAME`, reasoning-gym's own system prompt, and

- `reward_model.ground_truth`: task, configuration and entry as a Python literal (JSON has no
  tuples, which scorers compare);
- `extra_info`: `split`, `index`, `solution`, empty where the task has no single answer, and with
  `--difficulty` that number of the question, such as `num_terms` of chain_sum.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.command import (
    CommandParser,
    check_output,
    first_line,
    integer_in,
    progress_bar,
    run,
)
from data_prep.splits import Row, verl_row, write_splits
from hpo_verl.errors import ConfigError, DataError, EnvironmentCheckError
from hpo_verl.rewards.reasoning_gym import compute_score, is_permitted, load_scorer

# Not the task's but ours.
_OWN = ("seed", "size")
# So many questions a row are tried before a task counts as exhausted, and more of few rows.
_TRIES, _FREE_TRIES = 5, 1_000
# So many questions' own answers are scored: a symbolic integral takes half a second.
_SCORED = 100
_PROMPT = "default"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    options = vars(make_parser().parse_args(argv))
    out, sizes = options.pop("out"), {s: options[f"{s}_size"] for s in ("train", "val")}
    check_output(out)
    gym = load_scorer()
    config = read_config(options["name"], options["config"])
    total = sum(sizes.values())
    entries = _entries(gym, options["name"], config, options["seed"], total)
    with progress_bar() as progress, contextlib.redirect_stdout(sys.stderr):
        tracked = progress.track(entries, total, description="asking")
        rows = list(_rows(tracked, options["name"], config, sizes, options["difficulty"]))
    splits = {"train": rows[: sizes["train"]], "val": rows[sizes["train"] :]}
    task = f"reasoning_gym_{options['name']}"
    for split, path in write_splits(out, splits, {"task": task, **options}).items():
        print(f"{path}: {sizes[split]} questions")


def check_arguments(arguments: Mapping[str, str]) -> None:
    """Refuse a task or a configuration that does not exist, where reasoning-gym is installed."""
    # Without it, another check says how to get it.
    with contextlib.suppress(EnvironmentCheckError):
        read_config(arguments.get("--name", ""), arguments.get("--config", "{}"))


def read_config(name: str, text: str) -> dict[str, Any]:
    """The task's settings of a JSON object, checked by the task itself.

    Raises:
        ConfigError: names the task or setting, and the nearest ones.
    """
    load_scorer()
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ConfigError(f"name: no task {name!r} in reasoning-gym; {_nearest(name, DATASETS)}")
    if name == "codeio":
        # They write files where they run.
        raise ConfigError(f"name: {name} makes its questions by running programs of its data file")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config: {text[:100]!r} is not JSON") from error
    if not isinstance(config, dict):
        raise ConfigError(f"config: {text[:100]!r} is not a JSON object")
    kind = DATASETS[name][1]
    known = [field.name for field in fields(kind) if field.name not in _OWN]
    for key in config:
        if key not in known:
            raise ConfigError(f"config: {name} has no setting {key!r}; {_nearest(key, known)}")
    try:
        # Of which one task has none.
        getattr(kind(**config), "validate", dict)()
    except Exception as error:
        raise ConfigError(f"config: {name} refuses it: {first_line(error)}") from error
    return config


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"available: {', '.join(sorted(known))}"


def _entries(gym: Any, name: str, config: dict[str, Any], seed: int, count: int) -> Iterator[Any]:
    """Entries with different questions, and answers that the reward reads."""
    most = _TRIES * count + _FREE_TRIES
    # Some tasks draw from these without being asked to.
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    found: set[str] = set()
    try:
        dataset = gym.create_dataset(name, **config, seed=seed, size=most)
        for index in range(most):
            entry = dataset[index]
            solution = _solution(entry)
            if entry["question"] not in found and is_permitted(name, solution):
                found.add(entry["question"])
                yield entry
            if len(found) == count:
                return
    except Exception as error:
        text = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(
            f"{name}: reasoning-gym fails after {len(found)} questions: {text}"
        ) from error
    raise DataError(
        f"{name}: {count} questions wanted, but only {len(found)} different ones in {most} tries; "
        "ask for fewer"
    )


def _rows(
    entries: Iterable[Any],
    name: str,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    difficulty: str | None,
) -> Iterator[Row]:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    source = f"reasoning_gym_{name}"
    for number, entry in enumerate(entries):
        split = "train" if number < sizes["train"] else "val"
        index = number if split == "train" else number - sizes["train"]
        solution = _solution(entry)
        truth = {"task": name, "config": config, "entry": _plain(entry)}
        if number < _SCORED:
            _check(f"{name}: question {number + 1}", truth, solution)
        prompt = [
            {"role": "system", "content": SYSTEM_PROMPTS[_PROMPT].strip()},
            {"role": "user", "content": entry["question"]},
        ]
        info = {"split": split, "index": index, "solution": solution}
        if difficulty is not None:
            info["difficulty"] = _level(f"{name}: question {number + 1}", entry, difficulty)
        yield verl_row(source, prompt, "reasoning", repr(truth), info)


def _plain(value: Any) -> Any:
    """A value with Python's own numbers and texts in the place of numpy's."""
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _solution(entry: Mapping[str, Any]) -> str:
    """The task's own answer; empty where it has no single one."""
    return entry["answer"].strip() if isinstance(entry["answer"], str) else ""


def _level(where: str, entry: Mapping[str, Any], key: str) -> float:
    """A number of a question that says how hard it is; a DataError names those that it has."""
    numbers = {
        name: float(value)
        for name, value in _plain(entry["metadata"]).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if key not in numbers:
        raise DataError(f"{where}: difficulty: no number {key!r}; {_nearest(key, numbers)}")
    return numbers[key]


def _check(where: str, truth: dict[str, Any], solution: str) -> None:
    """Raise a DataError where an entry cannot be kept as text, or its scorer is no use."""
    try:
        kept = ast.literal_eval(repr(truth)) == truth
    except (ValueError, SyntaxError):
        kept = False
    if not kept:
        raise DataError(f"{where}: its entry holds more than numbers, texts and lists")

    def score(answer: str) -> float:
        return compute_score(where, f"<answer>{answer}</answer>", repr(truth))["score"]

    if solution and score(solution) < 1:
        raise DataError(f"{where}: its own answer scores 0: {solution[:100]!r}")
    if score("?") >= 1:
        raise DataError(f"{where}: an answer without sense (?) scores 1")


def make_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(
        prog="python -m data_prep.reasoning_gym",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, size = parser.add_argument, integer_in(1, 1_000_000)
    add("--name", required=True, help="the task, such as chain_sum")
    add("--config", default="{}", metavar="JSON", help="settings of the task ({})")
    add("--train-size", type=size, default=10_000, help="(10000)")
    add("--val-size", type=size, default=500, help="(500)")
    add("--seed", type=integer_in(0, 2**31 - 1), default=0, help="(0)")
    add("--difficulty", metavar="KEY", help="a number of the question's metadata, for a curriculum")
    add("--out", required=True, type=Path, metavar="DIR", help="folder, made if missing")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
