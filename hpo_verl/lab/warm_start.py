"""Warm starts: policies that are right in a given share of their answers.

Every seed has one skilled policy: a folder that the study names, or the tiny policy of
`data_prep.policies`, taught the task's own demonstrations where it does not know them. From there
it imitates careless answers until its success, measured on training questions, has fallen to the
level wanted. So all levels of a seed share their skill and differ in how seldom they use it.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_prep.command import staging
from data_prep.countdown.puzzles import puzzles_digest
from data_prep.manifest import check_files, read_manifest
from data_prep.policies import tiny as tiny_policy
from data_prep.policies.demos import Demonstrations, encode, token_batch
from data_prep.policies.folder import save_policy
from data_prep.policies.training import train
from hpo_verl.errors import DataError
from hpo_verl.lab.policy import Policy, Prompt, Responses
from hpo_verl.lab.settings import WARM_START_VERSION, Cell, warm_start_versions
from hpo_verl.lab.tasks import Question, Task, find_task
from hpo_verl.runs.files import locked, sha256_once

FACTS = "lab.json"
# Share of guesses that the tiny policy is shown at the end. Few for Countdown, so that it keeps
# its skill; TeleLogs keeps its own, since a policy that is sure of the cause leaves a few steps'
# work: measured, 5 % to 85 % success in four.
_GUESSES = {"countdown": 0.1}
_SKILL_STEPS = 600
_SKILL_LEARNING_RATE = 2e-3
_SKILL_BATCH = 64
_HABIT_STEPS = 200
_HABIT_LEARNING_RATE = 1e-4
_HABIT_BATCH = 32
_MEASURED = 1024


def cache_folder() -> Path:
    """`$HPO_VERL_CACHE/lab`, by default `~/.cache/hpo_verl/lab`."""
    root = os.environ.get("HPO_VERL_CACHE") or Path.home() / ".cache" / "hpo_verl"
    return Path(root).expanduser() / "lab"


def policy_folder(cell: Cell) -> Path:
    """Where the policy that a run begins with is kept."""
    sizes = f"{cell.training.questions}-{cell.evaluation.questions}"
    name = f"{cell.task}-{cell.warm_start:g}-seed{cell.seed}-{sizes}"
    if cell.policy is not None:
        files = sorted(Path(cell.policy).expanduser().glob("*.safetensors"))
        digests = "".join(sha256_once(file) for file in files)
        name += f"-{hashlib.sha256(digests.encode()).hexdigest()[:10]}"
    return cache_folder() / name


def make(cell: Cell) -> float:
    """Make the policy that a run begins with if it is not there, and return its success.

    Raises:
        DataError: Imitating careless answers does not bring the success down to the level.
        EnvironmentCheckError: The cache cannot be locked.
    """
    task, folder = find_task(cell.task), policy_folder(cell)
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
            policy = Policy.load(cell.policy or _skilled_folder(task, cell.seed, held_out))
            success = _unlearn(policy, cell, task, questions)
        finally:
            torch.set_num_threads(threads)
        facts = {"versions": warm_start_versions(), "success": success}
        save_policy(folder, policy.model, policy.tokenizer, FACTS, facts)
    return success


def answers(
    policy: Policy,
    task: Task,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    stream: tuple[int, ...],
    temperatures: Sequence[float] | None = None,
) -> tuple[Responses, dict[str, torch.Tensor]]:
    """Responses and the task's numbers of them by name, `[batch]`; `stream` seeds the sampling."""
    seeds = np.random.default_rng(stream).integers(2**63, size=len(questions)).tolist()
    responses = policy.sample(prompts, seeds, task.max_response_length, temperatures)
    pairs = zip(policy.decode(responses), questions, strict=True)
    scores = [task.score(text, question.ground_truth) for text, question in pairs]
    return responses, {name: torch.tensor([one[name] for one in scores]) for name in scores[0]}


def success_rate(
    policy: Policy, task: Task, questions: Sequence[Question], stream: tuple[int, ...]
) -> float:
    """Share of right answers, one per question."""
    return means(policy, task, questions, stream)["score"]


def means(
    policy: Policy, task: Task, questions: Sequence[Question], stream: tuple[int, ...]
) -> dict[str, float]:
    """Mean of each of the task's numbers by name, over one answer per question."""
    prompts = [policy.encode(question.messages) for question in questions]
    _, numbers = answers(policy, task, questions, prompts, stream)
    return {name: float(values.double().mean()) for name, values in numbers.items()}


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
            if task.demonstrations is not None:
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


def _unlearn(policy: Policy, cell: Cell, task: Task, questions: list[Question]) -> float:
    """Imitate careless answers until the measured success has fallen to the level; return it."""
    rng = random.Random(cell.seed)  # noqa: S311 - no secret
    shown = rng.choices(questions, k=_MEASURED)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=_HABIT_LEARNING_RATE)
    success = success_rate(policy, task, shown, (cell.seed,))
    for _ in range(_HABIT_STEPS):
        if success <= cell.warm_start:
            return success
        careless = [task.careless(rng, questions) for _ in range(_HABIT_BATCH)]
        batch = token_batch([encode(policy.tokenizer, each) for each in careless])
        train(policy.model, [batch], [optimizer])
        success = success_rate(policy, task, shown, (cell.seed,))
    raise DataError(
        f"warm start {task.name}, seed {cell.seed}: after {_HABIT_STEPS} careless batches "
        f"the success is still {success:.1%}, above the level {cell.warm_start:.1%}"
    )
