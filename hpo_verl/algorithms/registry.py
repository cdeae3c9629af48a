"""All records: the files of this folder, and packages with an entry point `hpo_verl.algorithms`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from hpo_verl.algorithms.base import Algorithm, Estimator, Loss
from hpo_verl.errors import EnvironmentCheckError

MODULES = ("hpo", "mhpo", "verl_own", "d3s", "spo", "bapo", "hapo", "aepo_advantage")
"""Files of this folder with records, in the order in which they are listed."""

ENTRY_POINTS = "hpo_verl.algorithms"


def records_of(found: Any) -> Iterator[Algorithm]:
    """Yield the records of a module (its `ALGORITHMS`), or a record itself.

    Raises:
        TypeError: It is neither.
    """
    records = found.ALGORITHMS if isinstance(found, ModuleType) else (found,)
    for record in records:
        if not isinstance(record, Algorithm):
            raise TypeError(f"{record!r} is no Algorithm")
        yield record


def installed_records() -> dict[str, list[Algorithm]]:
    """Load the records of other packages, by the name of their entry point.

    Raises:
        EnvironmentCheckError: An entry point cannot be loaded, or holds no record.
    """
    found = {}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            found[point.name] = list(records_of(point.load()))
        except Exception as error:
            raise EnvironmentCheckError(
                f"entry point {point.name!r} = {point.value!r} of {ENTRY_POINTS}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return found


def _collect() -> dict[str, Algorithm]:
    own = [import_module(f"hpo_verl.algorithms.{name}") for name in MODULES]
    algorithms = {record.name: record for module in own for record in records_of(module)}
    for point, records in installed_records().items():
        for record in records:
            taken = [(record, algorithms.get(record.name))]
            for known in algorithms.values():
                taken += [(record.estimator, known.estimator), (record.loss, known.loss)]
            for new, old in taken:
                if old is not None and new.name == old.name and new is not old:
                    raise EnvironmentCheckError(
                        f"entry point {point!r} of {ENTRY_POINTS}: {type(new).__name__.lower()} "
                        f"{new.name!r} is already there"
                    )
            algorithms[record.name] = record
    return algorithms


ALGORITHMS: dict[str, Algorithm] = _collect()
"""Every algorithm by the name of its recipe."""

ESTIMATORS: dict[str, Estimator] = {
    algorithm.estimator.name: algorithm.estimator for algorithm in ALGORITHMS.values()
}
"""Every estimator of an algorithm, by `algorithm.adv_estimator`."""

LOSSES: dict[str, Loss] = {
    **{algorithm.loss.name: algorithm.loss for algorithm in ALGORITHMS.values()},
    **{loss.name: loss for loss in import_module("hpo_verl.algorithms.verl_own").OTHER_LOSSES},
}
"""Every loss that is known here, verl's own included, by `policy_loss.loss_mode`."""

OUR_ESTIMATORS = {name: one for name, one in ESTIMATORS.items() if one.advantage is not None}
OUR_LOSSES = {name: one for name, one in LOSSES.items() if one.token_loss is not None}
