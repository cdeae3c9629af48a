"""All records: the files of this folder, and packages with an entry point `hpo_verl.algorithms`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from hpo_verl.algorithms.base import Algorithm, Estimator, Loss
from hpo_verl.algorithms.verl_own import OTHER_LOSSES
from hpo_verl.errors import EnvironmentCheckError

MODULES = (
    "hpo",
    "hysteretic_grpo",
    "mhpo",
    "verl_own",
    "d3s",
    "spo",
    "bapo",
    "hapo",
    "aepo_advantage",
    "w_reinforce",
    "maxrl",
    "asym_re",
    "ngrpo",
    "a3po",
    "topr",
    "aspo",
    "vespo",
    "gmpo",
    "epo",
    "aepo_entropy",
    "ares",
    "constrained_grpo",
    "hypervolume",
    "reward_gradients",
    "ahpo",
    "apo",
    "capo",
    "eapo",
)
"""Files of this folder with records, in the order in which they are listed."""

ENTRY_POINTS = "hpo_verl.algorithms"


def _records_of(found: Any) -> tuple[Algorithm, ...]:
    """Return the records of a module (its `ALGORITHMS`), or a record itself."""
    records = found.ALGORITHMS if isinstance(found, ModuleType) else (found,)
    for record in records:
        if not isinstance(record, Algorithm):
            raise TypeError(f"{record!r} is no Algorithm")
    return records


def _keep(source: str, known: dict[str, Any], new: Algorithm | Estimator | Loss) -> None:
    if known.setdefault(new.name, new) is not new:
        kind = type(new).__name__.lower()
        raise EnvironmentCheckError(f"{source}: {kind} {new.name!r} is already there")


def _collect() -> tuple[dict[str, Algorithm], dict[str, Estimator], dict[str, Loss]]:
    """Load all records.

    Raises:
        EnvironmentCheckError: An entry point cannot be loaded, holds no record, or one whose name
            is taken.
    """
    algorithms: dict[str, Algorithm] = {}
    estimators: dict[str, Estimator] = {}
    losses: dict[str, Loss] = {}

    def add(source: str, record: Algorithm) -> None:
        _keep(source, algorithms, record)
        _keep(source, estimators, record.estimator)
        _keep(source, losses, record.loss)

    for name in MODULES:
        for record in _records_of(import_module(f"hpo_verl.algorithms.{name}")):
            add(name, record)
    losses.update({loss.name: loss for loss in OTHER_LOSSES})
    for point in entry_points(group=ENTRY_POINTS):
        source = f"entry point {point.name!r} = {point.value!r} of {ENTRY_POINTS}"
        try:
            records = _records_of(point.load())
        except Exception as error:
            raise EnvironmentCheckError(f"{source}: {type(error).__name__}: {error}") from error
        for record in records:
            add(source, record)
    return algorithms, estimators, losses


ALGORITHMS, ESTIMATORS, LOSSES = _collect()
"""Algorithms by the name of their recipe, their estimators by `algorithm.adv_estimator`, and all
losses that are known here, verl's own included, by `policy_loss.loss_mode`."""

OUR_ESTIMATORS = {name: one for name, one in ESTIMATORS.items() if one.advantage is not None}
OUR_LOSSES = {name: one for name, one in LOSSES.items() if one.token_loss is not None}
