"""Make the tiny policy: `python -m data_prep.policies.tiny --out DIR [--task T] [--seed S]`.

The policy is a Qwen2 causal language model of about 0.15 million float32 parameters with its own
tokenizer, warm-started on demonstrations of Countdown with three numbers from 1 to 15, alone or
with a calculator, or of the compressed TeleLogs task (see `demos`). Its answers are right 5 to 15
times in a hundred; with a calculator 6 times (seed 0), and it asks for a value in every fifth
conversation.

The same seed, held-out puzzles and versions of torch and transformers give the same bytes on one
machine: the warm start runs on one thread, whatever is set.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.command import CommandParser, check_output, integer_in, progress_bar, run
from data_prep.countdown.puzzles import PuzzleKey, puzzles_digest, read_puzzles
from data_prep.manifest import check_files, read_manifest
from data_prep.policies.folder import check_replaceable, save_policy
from hpo_verl.errors import DataError

MANIFEST = "manifest.json"
# To be raised by every change after which a seed gives another policy.
RECIPE_VERSION = 2
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Schedule:
    """How long the warm start trains, and on which mixture.

    Mostly worked demonstrations teach the skill; then mostly guesses teach the habit of using it
    seldom. Steps are batches; a direct share is that of guesses, and the last one sets the
    policy's success.
    """

    skill_steps: int = 1200
    habit_steps: int = 150
    batch_size: int = 16
    skill_direct_share: float = 0.17
    habit_direct_share: float = 0.88

    @property
    def steps(self) -> int:
        """All batches."""
        return self.skill_steps + self.habit_steps

    @property
    def parts(self) -> tuple[tuple[int, float], tuple[int, float]]:
        """Steps and direct share: first for the skill, then for the habit."""
        return (
            (self.skill_steps, self.skill_direct_share),
            (self.habit_steps, self.habit_direct_share),
        )


SCHEDULES = {
    "countdown": Schedule(),
    "countdown_tool": Schedule(skill_steps=800, skill_direct_share=0.1, habit_direct_share=0.5),
    "telelogs": Schedule(skill_steps=300, skill_direct_share=0.3, habit_direct_share=0.95),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.held_out and options.task == "telelogs":
        parser.error("--held-out needs --task countdown or countdown_tool")
    held_out = read_puzzles(options.held_out) if options.held_out else ()
    with progress_bar() as progress:
        bar = progress.add_task("warm start", total=SCHEDULES[options.task].steps)
        manifest = make_policy(
            options.out, options.seed, held_out, task=options.task,
            progress=lambda done: progress.update(bar, completed=done),
        )  # fmt: skip
    print(
        f"{options.out}: {options.task}, {manifest['parameters']:,} parameters, "
        f"seed {options.seed}"
        + (f", {manifest['held_out']['puzzles']} puzzles held out" if options.held_out else "")
    )


def make_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(description="Make the tiny policy on a CPU.")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--task", choices=tuple(SCHEDULES), default="countdown")
    parser.add_argument("--seed", type=integer_in(0, MAX_SEED), default=0)
    shown = "parquet file of Countdown puzzles never to be shown"
    parser.add_argument("--held-out", type=Path, help=shown)
    return parser


def make_policy(
    out: str | Path,
    seed: int = 0,
    held_out: Collection[PuzzleKey] = (),
    schedule: Schedule | None = None,
    progress: Callable[[int], None] = lambda done: None,
    task: str = "countdown",
) -> dict[str, Any]:
    """Make the tiny policy in the folder `out`; an older one there is replaced.

    Args:
        out: Folder, made if missing.
        seed: Of the initial weights and the demonstrations.
        held_out: Puzzles that no demonstration of Countdown poses.
        schedule: That of the task if None.
        progress: Told the number of batches done.
        task: A key of `SCHEDULES`.

    Returns:
        The manifest, which is also in the folder.

    Raises:
        DataError: The folder cannot be written, or holds something else.
    """
    # Whoever only checks a policy needs none of these.
    import torch
    import transformers

    from data_prep.policies.demos import (
        CountdownDemonstrations,
        TeleLogsDemonstrations,
        ToolCountdownDemonstrations,
    )
    from data_prep.policies.tokenizer import build_tokenizer
    from data_prep.policies.training import build_model, warm_start

    out = Path(out).absolute()
    schedule = schedule or SCHEDULES[task]
    check_output(out)
    check_replaceable(out, MANIFEST)
    tokenizer = build_tokenizer()
    threads = torch.get_num_threads()
    try:
        # How sums are split among threads changes their last bits.
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_model(tokenizer)
            if task == "telelogs":
                demonstrations = TeleLogsDemonstrations(seed)
            elif task == "countdown_tool":
                demonstrations = ToolCountdownDemonstrations(seed, held_out)
            else:
                demonstrations = CountdownDemonstrations(seed, held_out)
            batches = (
                batch
                for steps, share in schedule.parts
                for batch in demonstrations.batches(tokenizer, steps, schedule.batch_size, share)
            )
            weighty: Any = tokenizer.convert_tokens_to_ids(list(demonstrations.weighty))
            warm_start(model, batches, schedule.steps, weighty, progress)
    finally:
        torch.set_num_threads(threads)
    facts = {
        "recipe_version": RECIPE_VERSION,
        "task": task,
        "seed": seed,
        "held_out": {"puzzles": len(set(held_out)), "sha256": puzzles_digest(held_out)},
        "schedule": asdict(schedule),
        "vocabulary": len(tokenizer),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return save_policy(out, model, tokenizer, MANIFEST, facts)


def check(directory: str | Path) -> dict[str, Any]:
    """Verify a policy that was made earlier, and return its manifest.

    Raises:
        DataError: Another recipe made it, or a file is missing or changed; names it.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, MANIFEST, ("recipe_version", "task", "seed", "held_out"))
    if manifest["recipe_version"] != RECIPE_VERSION:
        raise DataError(
            f"{directory / MANIFEST}: recipe_version is {manifest['recipe_version']}, "
            f"not {RECIPE_VERSION}"
        )
    check_files(directory, MANIFEST, manifest)
    return manifest


if __name__ == "__main__":
    sys.exit(run(main))
