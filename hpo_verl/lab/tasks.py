"""The lab's tasks: questions, the real reward functions, and texts for the warm start.

The tiny policy works before it answers, and takes a varying number of tokens for it. Careless
answers are wrong: they come at once, or after working that leads nowhere, as long as is asked for.
A policy that imitates both is seldom right, yet can do better.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from data_prep.countdown.puzzles import PuzzleKey, Ranges, puzzle_key, sample_puzzles, tiny_messages
from data_prep.policies.demos import (
    CountdownDemonstrations,
    Demonstrations,
    TeleLogsDemonstrations,
)
from data_prep.telelogs.__main__ import synthetic_rows
from hpo_verl.config.overrides import nearest
from hpo_verl.config.recipes import recipes_directory
from hpo_verl.errors import ConfigError
from hpo_verl.rewards import countdown, telelogs


class Question(NamedTuple):
    """A conversation to answer and what the reward compares the answer with."""

    messages: list[dict[str, str]]
    ground_truth: Any


@dataclass(frozen=True)
class Task:
    """What the trainer and the warm start need to know."""

    name: str
    # The tiny policy's task that a warm start begins with.
    policy: str
    # Name of the recipe whose settings an algorithm is put upon.
    recipe: str
    # Tokens, the end token included.
    max_response_length: int
    # From sizes and seed to training and held-out questions.
    questions: Callable[[int, int, int], tuple[list[Question], list[Question]]]
    # Numbers that the reward function returns for a response; the reward is `score`, 0.0 or 1.0.
    score: Callable[[str, Any], dict[str, float]]
    # Draws an answer to a question that is wrong.
    careless: Callable[[random.Random, Question], str]
    # Draws a line of working on a question that leads nowhere.
    idle: Callable[[random.Random, Question], str]
    # Puzzles of questions, which no demonstration may pose.
    keys: Callable[[list[Question]], set[PuzzleKey]]
    # From seed and such puzzles to demonstrations of the skill.
    demonstrations: Callable[[int, set[PuzzleKey]], Demonstrations]
    # Whether the tiny policy still has to be taught it.
    taught: bool = False


def find_task(name: str) -> Task:
    """Return a task by its name; an unknown one is a ConfigError that names the nearest."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}: {nearest(name, TASKS)}")
    return TASKS[name]


@cache
def _recipe_ranges(numbers: int) -> Ranges:
    """The ranges of the recipe `task=countdown_tiny`, for so many numbers."""
    recipe = OmegaConf.load(recipes_directory() / "task" / "countdown_tiny.yaml")
    arguments: Any = recipe.prepare.data.arguments
    keys = ("min_number", "max_number", "min_target", "max_target", "operators")
    return Ranges(numbers, **{key: arguments[key] for key in keys if key in arguments})


def _countdown_questions(
    train_size: int, held_out_size: int, seed: int, *, numbers: int
) -> tuple[list[Question], list[Question]]:
    puzzles = sample_puzzles(train_size + held_out_size, _recipe_ranges(numbers), seed)
    questions = [
        Question(
            tiny_messages(puzzle.numbers, puzzle.target),
            {"target": puzzle.target, "numbers": list(puzzle.numbers)},
        )
        for puzzle in puzzles
    ]
    return questions[:train_size], questions[train_size:]


def _score(
    compute_score: Callable[..., Any], source: str, response: str, ground_truth: Any
) -> dict[str, float]:
    result = compute_score(source, response, ground_truth)
    return {name: value for name, value in result.items() if isinstance(value, float)}


def _countdown_careless(rng: random.Random, question: Question) -> str:
    """All numbers of the puzzle but one in a row, which is never right."""
    numbers = question.ground_truth["numbers"]
    drawn = rng.sample(numbers, len(numbers) - 1)
    text = str(drawn[0]) + "".join(f"{rng.choice('+-*/')}{number}" for number in drawn[1:])
    return f"<answer>{text}</answer>"


def _countdown_idle(rng: random.Random, question: Question) -> str:
    """Add up the numbers of the puzzle in any order, the target unseen."""
    first, *rest = rng.sample(
        question.ground_truth["numbers"], len(question.ground_truth["numbers"])
    )
    total, line = first, str(first)
    for number in rest:
        total += number
        line += f"+{number}={total}"
    return line


def _telelogs_questions(
    train_size: int, held_out_size: int, seed: int
) -> tuple[list[Question], list[Question]]:
    def read(split: str, count: int) -> list[Question]:
        return [
            Question([{"role": "user", "content": row.question}], row.answer)
            for row in synthetic_rows(split, count, seed, "tiny")
        ]

    return read("train", train_size), read("val", held_out_size)


def _telelogs_careless(rng: random.Random, question: Question) -> str:
    """Put a feature into the box, which is no cause."""
    return f"\\boxed{{{rng.choice(question.messages[-1]['content'])}}}"


def _telelogs_idle(rng: random.Random, question: Question) -> str:
    """Copy some of the features."""
    letters = question.messages[-1]["content"]
    return letters[: rng.choice((3, 6, 9))]


def _countdown(numbers: int, max_response_length: int) -> Task:
    return Task(
        f"countdown{numbers}", "countdown", "countdown-tiny", max_response_length,
        partial(_countdown_questions, numbers=numbers),
        partial(_score, countdown.compute_score, "countdown"),
        _countdown_careless, _countdown_idle,
        lambda questions: {puzzle_key(question.ground_truth) for question in questions},
        partial(CountdownDemonstrations, numbers=numbers),
        taught=numbers > TINY_NUMBERS,
    )  # fmt: skip


# Numbers of the puzzles that the tiny policy knows.
TINY_NUMBERS = 3
TASKS = {
    "countdown3": _countdown(3, 24),
    "countdown4": _countdown(4, 36),
    "telelogs": Task(
        "telelogs", "telelogs", "telelogs-tiny", 24, _telelogs_questions,
        partial(_score, telelogs.compute_score, "telelogs_synthetic"),
        _telelogs_careless, _telelogs_idle, lambda questions: set(),
        lambda seed, keys: TeleLogsDemonstrations(seed),
    ),
}  # fmt: skip
