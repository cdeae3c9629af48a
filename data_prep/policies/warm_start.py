"""Warm-start a language model on Countdown: `python -m data_prep.policies.warm_start --base DIR`.

The usual first step before reinforcement learning: supervised training, by a few hundred generated
demonstrations (see `demos`), of any model in a folder, so that it writes answers in the form asked
for and is right a few times in a hundred. All weights are trained, in float32.

The same base, seed, held-out puzzles and versions of torch and transformers give the same bytes on
one machine: the training runs on two threads, whatever is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.command import (
    CommandParser,
    check_output,
    first_line,
    integer_in,
    progress_bar,
    run,
)
from data_prep.countdown.puzzles import PuzzleKey, puzzles_digest, read_puzzles, short_messages
from data_prep.policies.folder import check_no_code_in, check_replaceable, save_policy, turn_end
from data_prep.policies.tiny import MAX_SEED, Schedule
from hpo_verl.errors import DataError
from hpo_verl.runs.files import sha256_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "warm_start.json"
# To be raised by every change after which a seed gives another policy.
RECIPE_VERSION = 1
SCHEDULE = Schedule(
    skill_steps=36,
    habit_steps=6,
    batch_size=8,
    skill_direct_share=0.0,
    habit_direct_share=0.85,
)
_THREADS = 2
# Of the skill and of the habit: a gentle one, which would otherwise cost the skill.
_LEARNING_RATES = (2e-4, 7e-5)
_RAMP_STEPS = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    options = make_parser().parse_args(argv)
    # torch reads it when it is loaded: threads that spin would keep the cores from others.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    held_out = read_puzzles(options.held_out) if options.held_out else ()
    with progress_bar() as progress:
        bar = progress.add_task("warm start", total=SCHEDULE.steps)
        warm_start(
            options.base, options.out, options.seed, held_out,
            progress=lambda done: progress.update(bar, completed=done),
        )  # fmt: skip
    print(
        f"{options.out}: {options.base}, {SCHEDULE.steps * SCHEDULE.batch_size} demonstrations, "
        f"seed {options.seed}, {len(held_out)} puzzles held out"
    )


def make_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(description="Warm-start a language model on Countdown, on a CPU.")
    parser.add_argument("--base", required=True, type=Path, help="folder of the model to train")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--seed", type=integer_in(0, MAX_SEED), default=0)
    shown = "parquet file of Countdown puzzles never to be shown"
    parser.add_argument("--held-out", type=Path, help=shown)
    return parser


def warm_start(
    base: str | Path,
    out: str | Path,
    seed: int = 0,
    held_out: Collection[PuzzleKey] = (),
    schedule: Schedule = SCHEDULE,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Train a model on demonstrations into the folder `out`; an older one there is replaced.

    Args:
        base: Hugging Face folder of a causal model; it stays as it is.
        out: Folder, made if missing.
        seed: Of the demonstrations.
        held_out: Puzzles that no demonstration poses.
        schedule: How long, and on which mixture.
        progress: Told the number of batches done.

    Returns:
        The manifest, which is also in the folder.

    Raises:
        DataError: The base is no model that can be trained; the folder cannot be written, or
            holds something else.
    """
    base, out = Path(base).absolute(), Path(out).absolute()
    check_output(out)
    check_replaceable(out, MANIFEST)
    tokenizer, model = _load(base)
    # Whoever only checks a policy needs none of these.
    import torch
    import transformers

    from data_prep.policies.demos import LongCountdownDemonstrations
    from data_prep.policies.training import ramp_and_fall, train

    demonstrations = LongCountdownDemonstrations(seed, held_out)
    threads = torch.get_num_threads()
    try:
        # How sums are split among threads changes their last bits.
        torch.set_num_threads(_THREADS)
        before = 0
        for (steps, share), rate in zip(schedule.parts, _LEARNING_RATES, strict=True):
            batches = demonstrations.batches(tokenizer, steps, schedule.batch_size, share)
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
            shape = ramp_and_fall(steps, _RAMP_STEPS)
            train(
                model,
                batches,
                [optimizer],
                shape,
                progress=lambda done, n=before: progress(n + done),
            )
            before += steps
    finally:
        torch.set_num_threads(threads)
    facts = {
        "recipe_version": RECIPE_VERSION,
        "base": {path.name: sha256_once(path) for path in sorted(base.glob("*.safetensors"))},
        "seed": seed,
        "held_out": {"puzzles": len(set(held_out)), "sha256": puzzles_digest(held_out)},
        "schedule": asdict(schedule),
        "parameters": model.num_parameters(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return save_policy(out, model, tokenizer, MANIFEST, facts)


def _load(base: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load a base in float32, whose chat template must end an answer as the model does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not base.is_dir():
        raise DataError(f"--base: {base} is not a folder")
    check_no_code_in(base, "--base")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            base, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    # A damaged file ends in whatever error its next user has.
    except Exception as error:
        text = f"--base: {base}: cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise DataError(text) from error
    if not tokenizer.chat_template:
        raise DataError(f"--base: {base}: its tokenizer has no chat template")
    if not tokenizer.eos_token or not turn_end(tokenizer).startswith(tokenizer.eos_token):
        raise DataError(
            f"--base: {base}: its tokenizer ends with {tokenizer.eos_token!r}, but the chat "
            f"template ends an answer with {turn_end(tokenizer)!r}"
        )
    try:
        tokenizer.apply_chat_template(short_messages((1, 2, 3), 6), tokenize=False)
    # A template raises whatever it likes.
    except Exception as error:
        text = f"--base: {base}: its chat template takes no system message ({first_line(error)})"
        raise DataError(text) from error
    return tokenizer, model


if __name__ == "__main__":
    sys.exit(run(main))
