"""The lab's tasks: questions, the real reward functions, and texts for the warm start.

The tiny policy works before it answers, and takes a varying number of tokens for it. Careless
texts answer at once and wrongly. A policy that imitates both is seldom right, yet
can do better.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from data_prep.countdown.puzzles import PuzzleKey, Ranges, puzzle_key, sample_puzzles, tiny_messages
from data_prep.policies.demos import CountdownDemonstrations, Demonstration, Demonstrations
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
    # Draws an answer that is wrong.
    careless: Callable[[random.Random, list[Question]], Demonstration]
    # Puzzles of questions, which no demonstration may pose.
    keys: Callable[[list[Question]], set[PuzzleKey]]
    # From seed and such puzzles to demonstrations; None where the tiny policy has the skill.
    demonstrations: Callable[[int, set[PuzzleKey]], Demonstrations] | None = None


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


def _countdown_careless(rng: random.Random, questions: list[Question]) -> Demonstration:
    """All numbers of the puzzle but one in a row, which is never right."""
    question = rng.choice(questions)
    numbers = question.ground_truth["numbers"]
    drawn = rng.sample(numbers, len(numbers) - 1)
    text = str(drawn[0]) + "".join(f"{rng.choice('+-*/')}{number}" for number in drawn[1:])
    return Demonstration(question.messages, f"<answer>{text}</answer>")


def _telelogs_questions(
    train_size: int, held_out_size: int, seed: int
) -> tuple[list[Question], list[Question]]:
    def read(split: str, count: int) -> list[Question]:
        return [
            Question([{"role": "user", "content": row.question}], row.answer)
            for row in synthetic_rows(split, count, seed, "tiny")
        ]

    return read("train", train_size), read("val", held_out_size)


def _telelogs_careless(rng: random.Random, questions: list[Question]) -> Demonstration:
    """Put a feature into the box, which is no cause."""
    question = rng.choice(questions)
    feature = rng.choice(question.messages[-1]["content"])
    return Demonstration(question.messages, f"\\boxed{{{feature}}}")


def _countdown(
    numbers: int,
    max_response_length: int,
    demonstrations: Callable[[int, set[PuzzleKey]], Demonstrations] | None = None,
) -> Task:
    return Task(
        f"countdown{numbers}", "countdown", "countdown-tiny", max_response_length,
        partial(_countdown_questions, numbers=numbers),
        partial(_score, countdown.compute_score, "countdown"),
        _countdown_careless,
        lambda questions: {puzzle_key(question.ground_truth) for question in questions},
        demonstrations,
    )  # fmt: skip


TASKS = {
    "countdown3": _countdown(3, 24),
    "countdown4": _countdown(4, 36, partial(CountdownDemonstrations, numbers=4)),
    "telelogs": Task(
        "telelogs", "telelogs", "telelogs-tiny", 24, _telelogs_questions,
        partial(_score, telelogs.compute_score, "telelogs_synthetic"),
        _telelogs_careless, lambda questions: set(),
    ),
}  # fmt: skip
