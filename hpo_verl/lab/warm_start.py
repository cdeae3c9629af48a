"""Warm starts: policies that are right in a given share of their answers.

Every seed has one skilled policy: a folder that the study names, or the tiny policy of
`data_prep.policies`, taught the task's own demonstrations where it does not know them. From there
it imitates careless answers until its success, measured on training questions, has fallen to the
level wanted. So all levels of a seed share their skill and differ in how seldom they use it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.countdown.puzzles import puzzles_digest
from data_prep.policies import tiny as tiny_policy
from data_prep.policies.demos import encode, token_batch
from data_prep.policies.folder import check_files, read_manifest, save_policy
from data_prep.policies.training import train
from hpo_verl.errors import DataError
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.tasks import Question, Task
from hpo_verl.runs.files import sha256_once

# To be raised by every change after which a seed gives another policy.
VERSION = 3
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


class WarmStart(NamedTuple):
    """Which policy a run begins with.

    Attributes:
        task: The task.
        level: Success wanted, as a fraction.
        seed: Of weights, demonstrations and questions.
        questions: Number of training questions.
        held_out: Number of held-out questions, which no demonstration poses.
        policy: Folder of the skilled policy; None for the tiny policy.
    """

    task: Task
    level: float
    seed: int
    questions: int
    held_out: int
    policy: str | None = None

    @property
    def folder(self) -> Path:
        """Where the policy is kept."""
        name = f"{self.task.name}-{self.level:g}-seed{self.seed}-{self.questions}-{self.held_out}"
        if self.policy is not None:
            files = sorted(Path(self.policy).expanduser().glob("*.safetensors"))
            digests = "".join(sha256_once(file) for file in files)
            name += f"-{hashlib.sha256(digests.encode()).hexdigest()[:10]}"
        return cache_folder() / name


def cache_folder() -> Path:
    """`$HPO_VERL_CACHE/lab`, by default `~/.cache/hpo_verl/lab`."""
    root = os.environ.get("HPO_VERL_CACHE") or Path.home() / ".cache" / "hpo_verl"
    return Path(root).expanduser() / "lab"


def versions() -> str:
    """What a kept policy must agree with to be used again."""
    return f"{tiny_policy.RECIPE_VERSION}.{VERSION}"


def make(start: WarmStart) -> float:
    """Make a policy if it is not there, and return its success.

    Raises:
        DataError: Imitating careless answers does not bring the success down to the level, or
            the cache cannot be used.
    """
    threads = torch.get_num_threads()
    with _locked(start.seed):
        try:
            manifest = read_manifest(start.folder, FACTS, ("versions", "success"))
            check_files(start.folder, FACTS, manifest, "")
            if manifest["versions"] == versions():
                return float(manifest["success"])
        except DataError:
            # Missing, changed or damaged: made anew.
            pass
        questions, held_out = start.task.questions(start.questions, start.held_out, start.seed)
        # How sums are split among threads changes their last bits.
        torch.set_num_threads(1)
        try:
            policy = Policy.load(start.policy or _skilled_folder(start, held_out))
            success = _unlearn(policy, start, questions)
        finally:
            torch.set_num_threads(threads)
        shutil.rmtree(start.folder, ignore_errors=True)
        facts = {"versions": versions(), "success": success}
        save_policy(start.folder, policy.model, policy.tokenizer, FACTS, facts)
    return success


@contextlib.contextmanager
def _locked(seed: int) -> Iterator[None]:
    """Let one process at a time make the policies of a seed; the others wait for it."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / f".seed{seed}.lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: cannot write: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(
                f"{folder}: its file system keeps no locks ({error.strerror}); "
                "set HPO_VERL_CACHE to a folder on a local disk"
            ) from error
        yield


def success_rate(
    policy: Policy, task: Task, questions: Sequence[Question], stream: tuple[int, ...]
) -> float:
    """Share of right answers at temperature 1, one per question; `stream` seeds the sampling."""
    seeds = np.random.default_rng(stream).integers(2**63, size=len(questions)).tolist()
    prompts = [policy.encode(question.messages) for question in questions]
    texts = policy.decode(policy.sample(prompts, seeds, task.max_response_length))
    rewards = [
        task.score(text, question.ground_truth)
        for text, question in zip(texts, questions, strict=True)
    ]
    return sum(rewards) / len(rewards)


def _skilled_folder(start: WarmStart, held_out: list[Question]) -> Path:
    """Folder of the tiny policy that has the skill, made if it is not there."""
    task, seed, keys = start.task, start.seed, start.task.keys(held_out)
    folder = cache_folder() / f"skilled{VERSION}-{task.name}-seed{seed}-{puzzles_digest(keys)[:10]}"
    try:
        tiny_policy.check(folder)
    except DataError:
        shutil.rmtree(folder, ignore_errors=True)
        schedule = tiny_policy.SCHEDULES[task.policy]
        if task.policy in _GUESSES:
            schedule = replace(schedule, habit_direct_share=_GUESSES[task.policy])
        tiny_policy.make_policy(folder, seed, keys, schedule, task=task.policy)
        if task.demonstrations is not None:
            policy = Policy.load(folder)
            shown = task.demonstrations(seed, keys)
            optimizer = torch.optim.AdamW(policy.model.parameters(), lr=_SKILL_LEARNING_RATE)
            train(
                policy.model,
                shown.batches(policy.tokenizer, _SKILL_STEPS, _SKILL_BATCH, 0.0),
                [optimizer],
                rate=lambda step: 1.0 - 0.95 * step / _SKILL_STEPS,
            )
            manifest = read_manifest(folder, tiny_policy.MANIFEST, ())
            del manifest["files"]
            save_policy(folder, policy.model, policy.tokenizer, tiny_policy.MANIFEST, manifest)
    return folder


def _unlearn(policy: Policy, start: WarmStart, questions: list[Question]) -> float:
    """Imitate careless answers until success has fallen to the level; return the success.

    A skilled policy below the level stays as it is; the success is what was measured.
    """
    rng = random.Random(start.seed)  # noqa: S311 - no secret
    shown = rng.choices(questions, k=_MEASURED)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=_HABIT_LEARNING_RATE)
    success = success_rate(policy, start.task, shown, (start.seed,))
    for _ in range(_HABIT_STEPS):
        if success <= start.level:
            return success
        careless = [start.task.careless(rng, questions) for _ in range(_HABIT_BATCH)]
        batch = token_batch([encode(policy.tokenizer, each) for each in careless])
        train(policy.model, [batch], [optimizer])
        success = success_rate(policy, start.task, shown, (start.seed,))
    raise DataError(
        f"warm start {start.task.name}, seed {start.seed}: after {_HABIT_STEPS} careless batches "
        f"the success is still {success:.1%}, above the level {start.level:.1%}"
    )
