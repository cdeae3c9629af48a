"""Studies: Hydra files under `recipes/lab`, typed and checked before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.policies import tiny as tiny_policy
from hpo_verl.config.overrides import nearest
from hpo_verl.config.recipes import leaf_keys, recipes_directory, require_study
from hpo_verl.core.settings import parse_settings, require_integer, require_number
from hpo_verl.errors import ConfigError
from hpo_verl.lab.objective import read_objective
from hpo_verl.lab.tasks import find_task

# To be raised by every change of the trainer after which a cell gives other results.
TRAINER_VERSION = 4
# To be raised by every change of the warm start after which a seed gives another policy.
WARM_START_VERSION = 3


@dataclass(frozen=True)
class Training:
    """How a run trains; see `recipes/lab/base.yaml`."""

    steps: int
    prompts_per_step: int
    responses_per_prompt: int
    mini_batches: int
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
            ("mini_batches", 1), ("questions", self.prompts_per_step),
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

    def __post_init__(self) -> None:
        require_integer("evaluation.every", self.every, 1)
        require_integer("evaluation.questions", self.questions, 1)


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
    variant: str  # its name in the study
    algorithm: str
    settings: dict[str, Any]  # over the algorithm's recipe
    learning_rate: float  # that of `training` is not read
    seed: int  # of warm start, questions and sampling
    training: Training
    evaluation: Evaluation
    policy: str | None = None  # folder that the warm start begins with; None: the tiny policy

    @property
    def name(self) -> str:
        """Readable name with a digest of everything else, fit for a file."""
        facts = {**dataclasses.asdict(self), "versions": [TRAINER_VERSION, warm_start_versions()]}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        rate = f"{self.learning_rate:g}"
        return f"{self.task}-{self.warm_start:g}-{self.variant}-{rate}-seed{self.seed}-{digest}"


def warm_start_versions() -> str:
    """What a kept warm start must agree with to be used again."""
    return f"{tiny_policy.RECIPE_VERSION}.{WARM_START_VERSION}"


@dataclass(frozen=True)
class Study:
    """A comparison; see `recipes/lab/base.yaml` for its keys."""

    name: str
    policy: str | None
    tasks: list[str]
    warm_starts: list[float]
    seeds: int
    first_seed: int
    learning_rates: list[float] | None
    training: Training
    evaluation: Evaluation
    baseline: str
    variants: dict[str, Variant]

    def __post_init__(self) -> None:
        require_integer("seeds", self.seeds, 1)
        require_integer("first_seed", self.first_seed, 0)
        for key in ("tasks", "warm_starts", "variants"):
            if not getattr(self, key):
                raise ConfigError(f"study {self.name}: {key} is empty")
        for level in self.warm_starts:
            require_number("warm_starts", level, 0.0, 1.0, open_low=True)
        for rate in self.learning_rates or []:
            require_number("learning_rates", rate, 0.0, open_low=True)
        tasks = [find_task(name) for name in self.tasks]
        least = self.training.responses_per_step
        for name, variant in self.variants.items():
            if "/" in name or name.startswith("."):
                raise ConfigError(f"variants.{name}: the name must be fit for a file")
            # Its settings mean the same for every task.
            objective = read_objective(tasks[0], variant.algorithm, variant.settings)
            if objective.estimator.history and self.training.questions < least:
                raise ConfigError(
                    f"training.questions = {self.training.questions}: {variant.algorithm} takes "
                    f"one response per prompt; must be at least {least}, the responses of a step"
                )

    def cells(self) -> list[Cell]:
        """Every run of the study, seed by seed, so that a study cut short is still paired."""
        rates = self.learning_rates or [self.training.learning_rate]
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [
            Cell(
                self.name, task, float(level), name, variant.algorithm, variant.settings,
                float(rate), seed, self.training, self.evaluation, self.policy,
            )
            for seed, task, level, rate, (name, variant) in product(
                seeds, self.tasks, self.warm_starts, rates, self.variants.items()
            )
        ]  # fmt: skip


def read_study(name: str, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Study:
    """Compose a study with Hydra's overrides, check every value, and keep `only` some variants.

    Raises:
        ConfigError: An unknown name (with the nearest one), or a bad value.
    """
    require_study(name)
    with initialize_config_dir(str(recipes_directory() / "lab"), version_base=None):
        try:
            known = set(leaf_keys(compose(name)))
            for text in overrides:
                override = OverridesParser.create().parse_override(text)
                key = override.get_key_element()
                if not override.is_add() and not override.is_delete() and key not in known:
                    raise ConfigError(f"unknown setting {key!r} in {text!r}: {nearest(key, known)}")
            config = compose(name, overrides=list(overrides))
            values: Any = OmegaConf.to_container(config, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"study {name}: {str(error).strip().splitlines()[0]}") from error
    missing = [key for key in known - set(leaf_keys(config)) if not key.startswith("variants.")]
    if missing:
        raise ConfigError(f"study {name}: the setting {min(missing)} is missing")
    values["variants"] = values["variants"] or {}
    for variant in only:
        if variant not in values["variants"]:
            close = nearest(variant, values["variants"])
            raise ConfigError(f"--only {variant}: no variant of study {name}: {close}")
    for section, settings in {"training": Training, "evaluation": Evaluation}.items():
        values[section] = parse_settings(settings, values[section], section)
    values["variants"] = {
        variant: parse_settings(Variant, content, f"variants.{variant}")
        for variant, content in values["variants"].items()
        if not only or variant in only
    }
    return parse_settings(Study, {"name": name, **values}, f"study {name}")
