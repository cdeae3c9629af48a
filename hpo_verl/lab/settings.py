"""Studies: files of `recipes/lab`, typed and checked before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.policies import tiny as tiny_policy
from hpo_verl.config.overrides import nearest
from hpo_verl.config.studies import CROSSED, TUNED, Regime, read_study_file, regimes
from hpo_verl.core.settings import parse_settings, require_choice, require_integer, require_number
from hpo_verl.errors import ConfigError
from hpo_verl.lab.recipes import read_objective
from hpo_verl.lab.tasks import Task, find_task
from hpo_verl.report.studies import best_rate

# To be raised by every change of the trainer after which a cell gives other results.
TRAINER_VERSION = 5
# To be raised by every change of the warm start after which a seed gives another policy.
WARM_START_VERSION = 4
LACKING = ("use", "skill")


@dataclass(frozen=True)
class Training:
    """How a run trains; see `recipes/lab/base.yaml`."""

    steps: int
    prompts_per_step: int
    responses_per_prompt: int
    mini_batches: int
    epochs: int
    lag: int
    learning_rate: float
    max_grad_norm: float
    questions: int
    max_generation_batches: int

    @property
    def responses_per_step(self) -> int:
        """Responses that a step trains on."""
        return self.prompts_per_step * self.responses_per_prompt

    def __post_init__(self) -> None:
        for name, low in (
            ("steps", 1), ("prompts_per_step", 1), ("responses_per_prompt", 2),
            ("mini_batches", 1), ("epochs", 1), ("lag", 0), ("questions", self.prompts_per_step),
            ("max_generation_batches", 1),
        ):  # fmt: skip
            require_integer(f"training.{name}", getattr(self, name), low)
        for name in ("learning_rate", "max_grad_norm"):
            require_number(f"training.{name}", getattr(self, name), 0.0, open_low=True)
        if self.prompts_per_step % self.mini_batches:
            raise ConfigError(
                f"training.mini_batches = {self.mini_batches}: must divide "
                f"training.prompts_per_step = {self.prompts_per_step}"
            )


@dataclass(frozen=True)
class Evaluation:
    """How a run is measured; see `recipes/lab/base.yaml`."""

    every: int
    questions: int
    samples: int
    sampled_questions: int
    dissect_every: int

    def __post_init__(self) -> None:
        for name, low in (
            ("every", 1), ("questions", 1), ("samples", 0), ("sampled_questions", 1),
            ("dissect_every", 0),
        ):  # fmt: skip
            require_integer(f"evaluation.{name}", getattr(self, name), low)
        if self.sampled_questions > self.questions:
            raise ConfigError(
                f"evaluation.sampled_questions = {self.sampled_questions}: must be at most "
                f"evaluation.questions = {self.questions}"
            )


@dataclass(frozen=True)
class Variant:
    """An algorithm with settings of its own over its recipe's."""

    algorithm: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run: everything that decides its result."""

    study: str
    task: str
    warm_start: float  # success that the run begins with, as a fraction
    lacking: str  # of `LACKING`
    wrong_length: float | None  # of careless answers, in right ones; None: the task's shortest
    max_response_length: int | None  # tokens; None: the task's
    variant: str  # its name in the study
    algorithm: str
    settings: dict[str, Any]  # over the algorithm's recipe
    seed: int  # of warm start, questions and sampling
    training: Training
    evaluation: Evaluation
    policy: str | None = None  # folder that the warm start begins with; None: the tiny policy

    def __post_init__(self) -> None:
        require_number("warm_start", self.warm_start, 0.0, 1.0, open_low=True)
        require_choice("lacking", self.lacking, LACKING)
        if self.wrong_length is not None:
            require_number("wrong_length", self.wrong_length, 0.0, open_low=True)
        if self.max_response_length is not None:
            require_integer("max_response_length", self.max_response_length, 2)
        if self.lacking == "skill" and (self.wrong_length, self.policy) != (None, None):
            key = "policy" if self.policy else "wrong_length"
            raise ConfigError(
                f"{key} = {getattr(self, key)!r}: must be null with lacking = 'skill'"
            )
        if self.wrong_length is not None:
            # 4 and 4.0 are one run, and must have one name.
            object.__setattr__(self, "wrong_length", float(self.wrong_length))

    @property
    def longest(self) -> int:
        """Tokens of a response at most."""
        return self.max_response_length or self.setting.max_response_length

    @property
    def setting(self) -> Task:
        """The task, as it is named."""
        return find_task(self.task)

    @property
    def name(self) -> str:
        """Readable name with a digest of everything else, fit for a file."""
        facts = {**dataclasses.asdict(self), "versions": [TRAINER_VERSION, warm_start_versions()]}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        rate = f"{self.training.learning_rate:g}"
        return f"{self.task}-{self.warm_start:g}-{self.variant}-{rate}-seed{self.seed}-{digest}"


def warm_start_versions() -> str:
    """What a kept warm start must agree with to be used again."""
    return f"{tiny_policy.RECIPE_VERSION}.{WARM_START_VERSION}"


@dataclass(frozen=True)
class Study:
    """A comparison; see `recipes/lab/base.yaml` for its keys."""

    name: str
    policy: str | None
    regimes: list[Regime]
    seeds: int
    first_seed: int
    tuning_seeds: int
    evaluation: Evaluation
    baseline: str
    variants: dict[str, Variant]

    def __post_init__(self) -> None:
        require_integer("seeds", self.seeds, 1)
        require_integer("first_seed", self.first_seed, 0)
        require_integer("tuning_seeds", self.tuning_seeds, 0)
        if not self.variants:
            raise ConfigError(f"study {self.name}: variants is empty")
        for name in self.variants:
            if "/" in name or name.startswith("."):
                raise ConfigError(f"variants.{name}: the name must be fit for a file")
        for cell in self._cells([self.first_seed]):
            _check(cell)

    @property
    def size(self) -> int:
        """Number of all runs, those after tuning included."""
        if not self.tuning_seeds:
            return len(self.cells())
        one_seed = self._cells([self.first_seed])
        compared = {(cell.variant, _without_rate(cell)) for cell in one_seed}
        return len(self.cells()) + self.seeds * len(compared)

    def cells(self) -> list[Cell]:
        """Every run seed by seed, so that a study cut short is still paired.

        With `tuning_seeds` those of these seeds: what comes after them they choose.
        """
        return self._cells(self._seeds(0, self.tuning_seeds or self.seeds))

    def tunes(self, cell: Cell) -> bool:
        """Whether a run is one of those that choose a rate."""
        return cell.seed in self._seeds(0, self.tuning_seeds)

    def compared(self, areas: Mapping[str, float]) -> list[Cell]:
        """The runs that are compared after tuning, each variant of a regime at its best rate.

        Args:
            areas: Area under the success curve of every run of `cells`, by name.
        """
        found: dict[tuple[str, str], dict[float, list[float]]] = {}
        for cell in self.cells() if self.tuning_seeds else ():
            rates = found.setdefault((cell.variant, _without_rate(cell)), {})
            rates.setdefault(cell.training.learning_rate, []).append(areas[cell.name])
        best = {key: best_rate(rates) for key, rates in found.items()}
        cells = self._cells(self._seeds(self.tuning_seeds, self.seeds))
        return [
            cell
            for cell in cells
            if cell.training.learning_rate == best.get((cell.variant, _without_rate(cell)))
        ]

    def _seeds(self, after: int, count: int) -> range:
        return range(self.first_seed + after, self.first_seed + after + count)

    def _cells(self, seeds: Sequence[int]) -> list[Cell]:
        return [
            Cell(
                self.name,
                **{key: regime[key] for key in CROSSED},
                variant=name,
                algorithm=variant.algorithm,
                settings=variant.settings,
                seed=seed,
                training=_training(regime),
                evaluation=self.evaluation,
                policy=self.policy,
            )
            for seed in seeds
            for regime in self.regimes
            for name, variant in self.variants.items()
        ]


def read_study(name: str, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Study:
    """Compose a study with Hydra's overrides, check every value, and keep `only` some variants.

    Raises:
        ConfigError: An unknown name (with the nearest one), or a bad value.
    """
    values = read_study_file(name, overrides)
    values["variants"] = values["variants"] or {}
    for variant in only:
        if variant not in values["variants"]:
            close = nearest(variant, values["variants"])
            raise ConfigError(f"--only {variant}: no variant of study {name}: {close}")
    found = regimes(values)
    for key in (*CROSSED, "training"):
        del values[key]
    values["evaluation"] = parse_settings(Evaluation, values["evaluation"], "evaluation")
    values["variants"] = {
        variant: parse_settings(Variant, content, f"variants.{variant}")
        for variant, content in values["variants"].items()
        if not only or variant in only
    }
    return parse_settings(Study, {"name": name, "regimes": found, **values}, f"study {name}")


def _training(regime: Regime) -> Training:
    prefix = "training."
    values = {key.removeprefix(prefix): regime[key] for key in regime if key.startswith(prefix)}
    return parse_settings(Training, values, "training")


def _without_rate(cell: Cell) -> str:
    """What a rate is chosen for, besides the variant."""
    facts = {key: getattr(cell, key) for key in CROSSED}
    facts |= {**vars(cell.training), TUNED.rpartition(".")[2]: None}
    return json.dumps(facts)


def _check(cell: Cell) -> None:
    """Refuse an algorithm that the lab cannot run in a cell's regime."""
    objective = read_objective(cell.setting, cell.algorithm, cell.settings, cell.longest)
    if cell.evaluation.dissect_every:
        objective.require_dissectible(cell.variant)
    least = cell.training.responses_per_step
    if objective.estimator.history and cell.training.questions < least:
        raise ConfigError(
            f"training.questions = {cell.training.questions}: {cell.algorithm} takes one response "
            f"per prompt; must be at least {least}, the responses of a step"
        )
