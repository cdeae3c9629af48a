"""Make the tiny policy: `python -m data_prep.policies.tiny --out DIR [--task T] [--seed S]`.

The policy is a Qwen2 causal language model of about 0.15 million float32
parameters with its own tokenizer, warm-started on demonstrations of Countdown
with three numbers from 1 to 15 (see `tiny_demos_countdown`) or of the compressed
TeleLogs task (see `tiny_demos_telelogs`). Its answers are right 5 to 15 times in
a hundred; reinforcement learning does the rest.

The same seed, held-out puzzles and versions of torch and transformers give the
same bytes on one machine: the warm start runs on one thread, whatever is set.
The folder appears when it is complete, with a manifest that `check` verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from data_prep.command import CommandParser, integer_in, progress_bar, run
from data_prep.policies.demos import Demonstrations
from data_prep.policies.demos_countdown import CountdownDemonstrations, PuzzleKey
from data_prep.policies.demos_telelogs import TeleLogsDemonstrations
from data_prep.policies.tokenizer import build_tokenizer
from data_prep.policies.training import Schedule, build_model, warm_start
from data_prep.splits import check_output
from data_prep.tables import column_names
from hpo_verl.errors import DataError

MANIFEST = "manifest.json"
# To be raised by every change after which a seed gives another policy.
RECIPE_VERSION = 2
MAX_SEED = 2**31 - 1
SCHEDULES = {
    "countdown": Schedule(),
    "telelogs": Schedule(skill_steps=300, skill_direct_share=0.3, habit_direct_share=0.95),
}
_REQUIRED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    parser = CommandParser(description="Make the tiny policy on a CPU.")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--task", choices=tuple(SCHEDULES), default="countdown")
    parser.add_argument("--seed", type=integer_in(0, MAX_SEED), default=0)
    parser.add_argument(
        "--held-out", type=Path, help="parquet file of Countdown puzzles never to be shown"
    )
    arguments = parser.parse_args(argv)
    if arguments.held_out and arguments.task != "countdown":
        parser.error("--held-out needs --task countdown")
    check_output(arguments.out)
    started = perf_counter()
    with progress_bar() as progress:
        bar = progress.add_task("warm start", total=None)
        manifest = make_policy(
            arguments.out,
            arguments.seed,
            read_puzzles(arguments.held_out) if arguments.held_out else (),
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
            task=arguments.task,
        )
    print(
        f"{arguments.out}: {arguments.task}, {manifest['parameters']:,} parameters, "
        f"seed {arguments.seed}, {manifest['held_out']['puzzles']} puzzles held out, "
        f"{perf_counter() - started:.0f} s"
    )


def make_policy(
    out: str | Path,
    seed: int = 0,
    held_out: Collection[PuzzleKey] = (),
    schedule: Schedule | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    task: str = "countdown",
) -> dict[str, Any]:
    """Make the tiny policy in the folder `out`; an older one there is replaced.

    Args:
        out: Folder, made if missing.
        seed: Of the initial weights and the demonstrations.
        held_out: Puzzles, (sorted numbers, target), that no demonstration poses.
        schedule: Length and mixture of the warm start; that of the task if None.
        progress: Told the batches done and their total.
        task: A key of `SCHEDULES`.

    Returns:
        The manifest, which is also in the folder.

    Raises:
        DataError: The folder cannot be written, or holds something else.
    """
    out = Path(out).absolute()
    schedule = schedule or SCHEDULES[task]
    _check_replaceable(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    new_folders = [folder for folder in out.parents if not folder.exists()]
    done = False
    try:
        temporary.mkdir(parents=True)
        facts = _train_and_save(temporary, task, seed, held_out, schedule, progress)
        files = sorted(path.name for path in temporary.iterdir())
        manifest = {
            "recipe_version": RECIPE_VERSION,
            "task": task,
            "seed": seed,
            "held_out": {"puzzles": len(set(held_out)), "sha256": puzzles_digest(held_out)},
            "schedule": asdict(schedule),
            **facts,
            "files": {name: _digest(temporary / name) for name in files},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _replace(temporary, out)
        done = True
    except OSError as error:
        raise DataError(f"{out}: cannot write the policy: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not done:
            for folder in new_folders:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
    return manifest


def check(
    directory: str | Path, seed: int | None = None, held_out: Collection[PuzzleKey] | None = None
) -> dict[str, Any]:
    """Verify a policy that was made earlier, and return its manifest.

    Args:
        directory: The folder that `make_policy` made.
        seed: If given, the seed that it must have been made with.
        held_out: If given, the puzzles that must have been held out, and no others.

    Raises:
        DataError: A file is missing, damaged or does not belong, or the policy was
            made by another recipe, seed or held-out set. The message names the file
            and how to make the policy anew.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    remedy = (
        f"remove {directory} and make it anew: python -m data_prep.policies.tiny --out {directory}"
    )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        version, made_with = manifest["recipe_version"], manifest["seed"]
        hidden = manifest["held_out"]["sha256"]
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not a manifest of this package; {remedy}") from error
    if version != RECIPE_VERSION:
        raise DataError(f"{path}: recipe_version is {version}, not {RECIPE_VERSION}; {remedy}")
    if seed is not None and made_with != seed:
        raise DataError(f"{path}: seed is {made_with}, not {seed}; {remedy}")
    if held_out is not None and hidden != puzzles_digest(held_out):
        raise DataError(f"{path}: was made with other held-out puzzles; {remedy}")
    for name in _REQUIRED:
        if name not in files:
            raise DataError(f"{path}: lists no {name}; {remedy}")
    for name, expected in files.items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise DataError(f"{file}: no such file, but {MANIFEST} lists it; {remedy}")
        if _digest(file) != expected:
            raise DataError(f"{file}: its sha256 is not the one in {MANIFEST}; {remedy}")
    return manifest


def read_puzzles(path: str | Path) -> set[PuzzleKey]:
    """Return the puzzles of a Countdown parquet file, up to the order of their numbers.

    Raises:
        DataError: The file is missing or damaged, or a row is no puzzle.
    """
    path = Path(path)
    column = "reward_model"
    if column not in column_names(path):
        raise DataError(f"{path}: column '{column}' is missing; a Countdown file is needed")
    try:
        rows = pq.read_table(path, columns=[column]).column(column).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot read: {str(error).splitlines()[0]}") from error
    puzzles: set[PuzzleKey] = set()
    for number, row in enumerate(rows, start=1):
        try:
            truth = row["ground_truth"]
            puzzles.add((tuple(sorted(map(int, truth["numbers"]))), int(truth["target"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: row {number}: reward_model.ground_truth is not "
                "{target: integer, numbers: [integer, ...]}"
            ) from error
    return puzzles


def puzzles_digest(puzzles: Collection[PuzzleKey]) -> str:
    """Return the sha256 of a set of puzzles, whatever their order."""
    keys = sorted({(tuple(sorted(numbers)), target) for numbers, target in puzzles})
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def _train_and_save(
    folder: Path,
    task: str,
    seed: int,
    held_out: Collection[PuzzleKey],
    schedule: Schedule,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Warm-start a policy, save it in the folder, and return facts for its manifest."""
    tokenizer = build_tokenizer()
    threads = torch.get_num_threads()
    try:
        # How sums are split among threads changes their last bits.
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_model(tokenizer)
            demonstrations: Demonstrations = (
                TeleLogsDemonstrations(tokenizer, seed)
                if task == "telelogs"
                else CountdownDemonstrations(tokenizer, seed, held_out)
            )
            warm_start(model, demonstrations, schedule, lambda done: progress(done, schedule.steps))
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "vocabulary": len(tokenizer),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _check_replaceable(out: Path) -> None:
    check_output(out)
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise DataError(f"{out}: holds files but no {MANIFEST}; name a new or an empty folder")


def _replace(temporary: Path, out: Path) -> None:
    """Put the new folder in the place of the old one, which goes only once that worked."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(temporary, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(run(main))
