"""Warm starts: policies that are right in a given share of their answers.

Every seed has one skilled policy: a folder that the study names, or the tiny policy of
`data_prep.policies`, taught the task's own demonstrations where it does not know them. It then
imitates a mixture: its own answers, and careless ones, wrong and of a given length. So all levels
of a seed share their skill and differ in how seldom they use it.

Where skill is to be lacking, an untrained policy imitates demonstrations until it is right in that
share of its answers.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.command import staging
from data_prep.countdown.puzzles import puzzles_digest
from data_prep.manifest import check_files, read_manifest
from data_prep.policies import tiny as tiny_policy
from data_prep.policies.demos import Demonstration, Demonstrations, encode, token_batch
from data_prep.policies.folder import save_policy
from data_prep.policies.tokenizer import build_tokenizer
from data_prep.policies.training import build_model, train
from hpo_verl.errors import DataError
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.rollout import Rollout, answers, means
from hpo_verl.lab.settings import WARM_START_VERSION, Cell, warm_start_versions
from hpo_verl.lab.tasks import Question, Task
from hpo_verl.runs.files import locked, sha256_once

FACTS = "lab.json"
# Share of guesses that the tiny policy is shown at the end. Few for Countdown, so that it keeps
# its skill; TeleLogs keeps its own, since a policy that is sure of the cause leaves a few steps'
# work: measured, 5 % to 85 % success in four.
_GUESSES = {"countdown": 0.1}
_SKILL_STEPS = 600
_SKILL_LEARNING_RATE = 2e-3
_SKILL_BATCH = 64
_LACKING_BATCHES = 200
# Batches of demonstrations between two measurements.
_LACKING_EVERY = 5
_HABIT_STEPS = 100
_HABIT_LEARNING_RATE = 1e-3
_HABIT_BATCH = 64
# Small steps that bring the success to its level after that.
_ADJUSTING_STEPS = 200
_ADJUSTING_LEARNING_RATE = 1e-4
# The success may be so far from the level, as a share of it, or so many answers.
_TOLERANCE = 0.15
_TOLERATED_ANSWERS = 2
_MEASURED = 1024


def cache_folder() -> Path:
    """`$HPO_VERL_CACHE/lab`, by default `~/.cache/hpo_verl/lab`."""
    root = os.environ.get("HPO_VERL_CACHE") or Path.home() / ".cache" / "hpo_verl"
    return Path(root).expanduser() / "lab"


def policy_folder(cell: Cell) -> Path:
    """Where the policy that a run begins with is kept."""
    how = "short" if cell.wrong_length is None else f"{cell.wrong_length:g}"
    parts = (
        cell.task, cell.lacking, f"{cell.warm_start:g}", how, cell.longest, f"seed{cell.seed}",
        cell.training.questions, cell.evaluation.questions,
    )  # fmt: skip
    name = "-".join(map(str, parts))
    if cell.policy is not None:
        name += f"-{weights_digest(Path(cell.policy).expanduser())[:10]}"
    return cache_folder() / name


def weights_digest(folder: Path) -> str:
    """SHA-256 over those of a policy's files of weights."""
    digests = "".join(sha256_once(file) for file in sorted(folder.glob("*.safetensors")))
    return hashlib.sha256(digests.encode()).hexdigest()


def make(cell: Cell) -> float:
    """Make the policy that a run begins with if it is not there, and return its success.

    Raises:
        DataError: The success cannot be brought to the level.
        EnvironmentCheckError: The cache cannot be locked.
    """
    task, folder = cell.setting, policy_folder(cell)
    threads = torch.get_num_threads()
    # One process at a time makes the policies of a seed; the others wait for it.
    lock = cache_folder() / f"seed{cell.seed}.lock"
    with locked(lock, remedy="set HPO_VERL_CACHE to a folder", wait=True):
        try:
            manifest = read_manifest(folder, FACTS, ("versions", "success"))
            check_files(folder, FACTS, manifest)
            if manifest["versions"] == warm_start_versions():
                return float(manifest["success"])
        except DataError:
            # Missing, changed or damaged: made anew.
            pass
        questions, held_out = task.questions(
            cell.training.questions, cell.evaluation.questions, cell.seed
        )
        # How sums are split among threads changes their last bits.
        torch.set_num_threads(1)
        try:
            if cell.lacking == "skill":
                policy, success = _beginner(cell, questions, held_out)
            else:
                own = cell.policy and Path(cell.policy).expanduser()
                policy = Policy.load(own or _skilled_folder(task, cell.seed, held_out))
                success = _become_careless(policy, cell, questions)
        finally:
            torch.set_num_threads(threads)
        facts = {"versions": warm_start_versions(), "success": success}
        save_policy(folder, policy.model, policy.tokenizer, FACTS, facts)
    return success


def _skilled_folder(task: Task, seed: int, held_out: list[Question]) -> Path:
    """Folder of the tiny policy that has the skill, made if it is not there."""
    keys = task.keys(held_out)
    name = f"skilled{WARM_START_VERSION}-{task.name}-seed{seed}-{puzzles_digest(keys)[:10]}"
    folder = cache_folder() / name
    try:
        tiny_policy.check(folder)
    except DataError:
        schedule = tiny_policy.SCHEDULES[task.policy]
        if task.policy in _GUESSES:
            schedule = replace(schedule, habit_direct_share=_GUESSES[task.policy])
        with staging(cache_folder()) as temporary:
            made = temporary / name
            tiny_policy.make_policy(made, seed, keys, schedule, task=task.policy)
            if task.taught:
                _teach(made, task.demonstrations(seed, keys))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
    return folder


def _teach(folder: Path, shown: Demonstrations) -> None:
    """Let the tiny policy of a folder imitate demonstrations of the task's own."""
    policy = Policy.load(folder)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=_SKILL_LEARNING_RATE)
    train(
        policy.model,
        shown.batches(policy.tokenizer, _SKILL_STEPS, _SKILL_BATCH, 0.0),
        [optimizer],
        rate=lambda step: 1.0 - 0.95 * step / _SKILL_STEPS,
    )
    manifest = read_manifest(folder, tiny_policy.MANIFEST)
    del manifest["files"]
    save_policy(folder, policy.model, policy.tokenizer, tiny_policy.MANIFEST, manifest)


def _beginner(
    cell: Cell, questions: list[Question], held_out: list[Question]
) -> tuple[Policy, float]:
    """Return a policy whose skill is as far as the level, and its success."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        policy = Policy(build_model(tokenizer).eval(), tokenizer)
    shown = cell.setting.demonstrations(cell.seed, cell.setting.keys(held_out))
    optimizer = torch.optim.AdamW(policy.weights, lr=_SKILL_LEARNING_RATE)
    asked = random.Random(cell.seed).choices(questions, k=_MEASURED)  # noqa: S311 - no secret
    success = 0.0
    for _ in range(_LACKING_BATCHES):
        batches = shown.batches(tokenizer, _LACKING_EVERY, _SKILL_BATCH, 0.0)
        train(policy.model, batches, [optimizer])
        success = _success(policy, cell, asked)
        if success >= cell.warm_start:
            return policy, success
    raise _unreached(cell, success)


def _become_careless(policy: Policy, cell: Cell, questions: list[Question]) -> float:
    """Imitate own and careless answers until the success is at the level; return it."""
    rng = random.Random(cell.seed)  # noqa: S311 - no secret
    asked = rng.choices(questions, k=_MEASURED)
    before = answers(policy, cell.setting, asked, (cell.seed,), cell.longest)
    success = float((before.rewards > 0).double().mean())
    if success <= cell.warm_start:
        return success
    own = _ended(policy, asked, before)
    length = None
    if cell.wrong_length is not None:
        right = before.responses.mask.sum(dim=-1)[before.rewards > 0].double().mean()
        length = cell.wrong_length * float(right)
    drawn = rng.choices(questions, k=_MEASURED)
    careless = [_careless(rng, cell.setting, each, policy.tokenizer, length) for each in drawn]
    pools = [[encode(policy.tokenizer, shown) for shown in pool] for pool in (careless, own)]

    def imitate(batches: int, share: float, optimizer: torch.optim.Optimizer) -> None:
        shown = (
            token_batch([rng.choice(pools[rng.random() < share]) for _ in range(_HABIT_BATCH)])
            for _ in range(batches)
        )
        train(policy.model, shown, [optimizer])

    share = cell.warm_start / success
    for rate, part in ((_HABIT_LEARNING_RATE, 0.75), (_HABIT_LEARNING_RATE / 5, 0.25)):
        optimizer = torch.optim.AdamW(policy.weights, lr=rate)
        imitate(round(part * _HABIT_STEPS), share, optimizer)
    optimizer = torch.optim.AdamW(policy.weights, lr=_ADJUSTING_LEARNING_RATE)
    tolerance = max(_TOLERANCE * cell.warm_start, _TOLERATED_ANSWERS / _MEASURED)
    for _ in range(_ADJUSTING_STEPS):
        success = _success(policy, cell, asked)
        if abs(success - cell.warm_start) <= tolerance:
            return success
        imitate(1, 0.0 if success > cell.warm_start else 1.0, optimizer)
    raise _unreached(cell, success)


def _ended(policy: Policy, asked: list[Question], given: Rollout) -> list[Demonstration]:
    """Answers that came to their end, as demonstrations."""
    ended = given.responses.ended(policy.ends).tolist()
    texts = policy.decode(given.responses)
    rows = zip(asked, texts, ended, strict=True)
    return [Demonstration(question.messages, text) for question, text, end in rows if end]


def _careless(
    rng: random.Random, task: Task, question: Question, tokenizer: Any, length: float | None
) -> Demonstration:
    """A wrong answer after idle lines, so many that it has about `length` tokens."""
    answer = task.careless(rng, question)

    def tokens(lines: list[str]) -> int:
        # With the token that ends a response.
        return len(tokenizer.encode("\n".join(lines), add_special_tokens=False)) + 1

    lines = [answer]
    while length is not None:
        longer = [task.idle(rng, question), *lines]
        # The nearer of the two; a tie ends it.
        if abs(tokens(longer) - length) >= abs(tokens(lines) - length):
            break
        lines = longer
    return Demonstration(question.messages, "\n".join(lines))


def _success(policy: Policy, cell: Cell, asked: list[Question]) -> float:
    """Share of right answers, one per question."""
    return means(policy, cell.setting, asked, (cell.seed,), cell.longest)["score"]


def _unreached(cell: Cell, success: float) -> DataError:
    return DataError(
        f"warm start {cell.task}, seed {cell.seed}: the success is {success:.1%} at the end, not "
        f"{cell.warm_start:.1%}; choose another warm_start"
    )
