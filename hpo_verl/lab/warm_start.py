"""Warm starts: policies that are right in a given share of their answers.

Every seed has one skilled policy: that of `data_prep.policies.tiny`, taught the task by a second
warm start where it does not know it. From there it imitates careless answers until its success,
measured on training questions, has fallen to the level wanted. So all levels of a seed share
their skill and differ in how seldom they use it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_prep.policies import tiny as tiny_policy
from hpo_verl.errors import DataError
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.sampling import noise, sample
from hpo_verl.lab.tasks import Demonstration, Question, Task, puzzle_key

# To be raised by every change after which a seed gives another policy.
VERSION = 2
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
    """

    task: Task
    level: float
    seed: int
    questions: int
    held_out: int

    @property
    def folder(self) -> Path:
        """Where the policy is kept."""
        name = f"{self.task.name}-{self.level:g}-seed{self.seed}"
        return cache_folder() / f"{name}-{self.questions}-{self.held_out}"


def cache_folder() -> Path:
    """`$HPO_VERL_CACHE/lab`, by default `~/.cache/hpo_verl/lab`."""
    root = os.environ.get("HPO_VERL_CACHE") or Path.home() / ".cache" / "hpo_verl"
    return Path(root).expanduser() / "lab"


def versions() -> str:
    """What a kept policy must agree with to be used again."""
    return f"{tiny_policy.RECIPE_VERSION}.{VERSION}"


def measured_success(start: WarmStart) -> float | None:
    """Success of a policy that was made earlier, None where it must be made (anew)."""
    return _kept_success(start.folder)


def _kept_success(folder: Path) -> float | None:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if facts["versions"] == versions() and facts["sha256"] == digest:
            return float(facts["success"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def make(start: WarmStart) -> float:
    """Make a policy if it is not there, and return its success.

    Raises:
        DataError: Imitating careless answers does not bring the success down to the level.
    """
    threads = torch.get_num_threads()
    with _locked(start.seed):
        kept = measured_success(start)
        if kept is not None:
            return kept
        questions, held_out = start.task.questions(start.questions, start.held_out, start.seed)
        # How sums are split among threads changes their last bits.
        torch.set_num_threads(1)
        try:
            policy = _skilled(start, questions, held_out)
            success = _unlearn(policy, start, questions)
        finally:
            torch.set_num_threads(threads)
        save(policy, start.folder, success)
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
    policy: Policy, task: Task, questions: list[Question], stream: tuple[int, ...]
) -> float:
    """Share of right answers at temperature 1, one answer per question.

    Args:
        policy: To sample from.
        task: Whose reward counts.
        questions: To answer.
        stream: Seed of the sampling, to which each question adds its place.
    """
    prompts = policy.encode([question.messages for question in questions])
    seeds = [(*stream, i) for i in range(len(questions))]
    responses = sample(policy, prompts, noise(seeds, task.max_response_length))
    texts = policy.tokenizer.batch_decode(responses.tokens, skip_special_tokens=True)
    rewards = [
        task.score(text, question.ground_truth)
        for text, question in zip(texts, questions, strict=True)
    ]
    return sum(rewards) / len(rewards)


def _skilled(start: WarmStart, questions: list[Question], held_out: list[Question]) -> Policy:
    """The skilled policy of a task and seed, made if it is not there."""
    task, seed = start.task, start.seed
    keys: set[Any] = set()
    if task.policy == "countdown":
        keys = {puzzle_key(question.ground_truth) for question in held_out}
    digest = tiny_policy.puzzles_digest(keys)[:10]
    tiny = cache_folder() / f"tiny{VERSION}-{task.policy}-seed{seed}-{digest}"
    try:
        tiny_policy.check(tiny)
    except DataError:
        shutil.rmtree(tiny, ignore_errors=True)
        schedule = tiny_policy.SCHEDULES[task.policy]
        if task.policy in _GUESSES:
            schedule = replace(schedule, habit_direct_share=_GUESSES[task.policy])
        tiny_policy.make_policy(tiny, seed, keys, schedule, task=task.policy)
    if task.worked is None:
        return Policy.load(tiny)
    folder = start.folder.with_name(f"{task.name}-skilled-{start.folder.name.split('-', 2)[2]}")
    if _kept_success(folder) is None:
        policy = Policy.load(tiny)
        _teach(policy, task, questions, held_out, seed)
        save(policy, folder, success_rate(policy, task, questions[:_MEASURED], (seed,)))
    return Policy.load(folder)


def _teach(
    policy: Policy, task: Task, questions: list[Question], held_out: list[Question], seed: int
) -> None:
    """Imitate the working author of a task that the tiny policy does not know."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    hidden = {_identity(question.messages) for question in held_out}

    def draw() -> Demonstration:
        assert task.worked is not None  # noqa: S101 - for the type checker
        while True:
            shown = task.worked(rng, questions)
            if _identity(shown.messages) not in hidden:
                return shown

    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=_SKILL_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, _SKILL_STEPS)
    for _ in range(_SKILL_STEPS):
        imitate(policy, optimizer, [draw() for _ in range(_SKILL_BATCH)])
        scheduler.step()


def _identity(messages: list[dict[str, str]]) -> str:
    """A question up to the order of its words, so that a puzzle has one identity."""
    return " ".join(sorted(messages[-1]["content"].split()))


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
        imitate(policy, optimizer, careless)
        success = success_rate(policy, start.task, shown, (start.seed,))
    raise DataError(
        f"warm start {start.task.name}, seed {start.seed}: after {_HABIT_STEPS} careless batches "
        f"the success is still {success:.1%}, above the level {start.level:.1%}"
    )


def imitate(policy: Policy, optimizer: torch.optim.Optimizer, shown: list[Demonstration]) -> float:
    """Take one step on demonstrations and return the loss, nats per token."""
    prompts = policy.encode([demonstration.messages for demonstration in shown])
    rows = [
        [*policy.tokenizer.encode(demonstration.response, add_special_tokens=False), policy.end]
        for demonstration in shown
    ]
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), policy.pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    optimizer.zero_grad()
    loss = -policy.response_log_probs(prompts, tokens, mask).sum() / mask.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def save(policy: Policy, folder: Path, success: float) -> None:
    """Keep a policy under a folder's name, with its success; there whole or not at all.

    Raises:
        DataError: The folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        policy.model.save_pretrained(temporary)
        policy.tokenizer.save_pretrained(temporary)
        digest = hashlib.sha256((temporary / "model.safetensors").read_bytes()).hexdigest()
        facts = {"versions": versions(), "success": success, "sha256": digest}
        (temporary / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot write the policy: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
