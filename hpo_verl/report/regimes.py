"""Regimes of a study: which its file plans, and the words that tell one from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from hpo_verl.config.studies import TUNED, read_study_file, regime_of, regimes

Regime = tuple[tuple[str, Any], ...]
"""Dotted key and value of everything that a run trained with, besides its variant and seed."""

_AS_IT_COMES = {
    "wrong_length": "wrong answers short",
    "max_response_length": "responses as long as the task permits",
    "policy": "the tiny policy",
}
_WORDS = {
    "task": "{}",
    "warm_start": "warm start {:.3g} %",
    "lacking": "{} is lacking",
    "wrong_length": "wrong answers {:g} x right ones",
    "max_response_length": "responses of at most {} tokens",
    "policy": "policy {}",
    "training.learning_rate": "learning rate {:g}",
    "training.mini_batches": "{} mini-batches",
    "training.epochs": "passes: {}",
    "training.lag": "sampled by a policy {} steps old",
}


class Plan(NamedTuple):
    """What the file of a study plans.

    Attributes:
        variants: For every name its `algorithm` and `settings`, as in the cell of a run.
        regimes: In the file's order. Where rates are `tuned`, without the learning rate.
        evaluation: How success is measured.
        tuned: Whether every variant is compared at its own best rate.
    """

    study: str
    baseline: str
    variants: Mapping[str, Mapping[str, Any]]
    regimes: tuple[Regime, ...]
    evaluation: Mapping[str, Any]
    tuned: bool = False

    def regime_of(self, cell: Mapping[str, Any]) -> Regime:
        """The regime of a run, from the fields of its cell."""
        return _regime(regime_of(cell), cell["policy"], self.tuned)


@cache
def read_plan(study: str) -> Plan:
    """Read the plan of a study of `recipes/lab`.

    Raises:
        ConfigError: There is no such study, or its file is bad.
    """
    values = read_study_file(study)
    tuned = values["tuning_seeds"] > 0
    found = [_regime(regime, values["policy"], tuned) for regime in regimes(values)]
    return Plan(
        study,
        str(values["baseline"]),
        {str(name): {"settings": {}, **made} for name, made in values["variants"].items()},
        tuple(dict.fromkeys(found)),
        values["evaluation"],
        tuned,
    )


def _regime(values: Mapping[str, Any], policy: str | None, tuned: bool) -> Regime:
    kept = {key: value for key, value in values.items() if not (tuned and key == TUNED)}
    return tuple({**kept, "policy": policy}.items())


def varying(regimes: Sequence[Regime]) -> list[str]:
    """Keys that tell some regimes apart; where there is one regime only, its task."""
    values: dict[str, set[Any]] = {}
    for regime in regimes:
        for key, value in regime:
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1] or ["task"]


def title(regime: Regime, keys: Sequence[str]) -> str:
    """Some values of a regime in words."""
    return ", ".join(_words(key, value) for key, value in regime if key in keys)


def _words(key: str, value: Any) -> str:
    if value is None:
        return _AS_IT_COMES.get(key, f"no {key}")
    if key == "warm_start":
        value = 100 * value
    if key == "policy":
        value = str(value).rstrip("/").rpartition("/")[2]
    return _WORDS.get(key, f"{key.removeprefix('training.')} {{}}").format(value)
