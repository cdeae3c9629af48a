"""The records as the tables of before; goes when nobody reads it any more."""

from __future__ import annotations

from typing import NamedTuple

from hpo_verl.algorithms import registry
from hpo_verl.algorithms.base import (  # noqa: F401
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM_NORM,
    TOKEN_MEAN,
)
from hpo_verl.algorithms.registry import LOSSES, OUR_ESTIMATORS, OUR_LOSSES


class Algorithm(NamedTuple):
    """A row of the table."""

    name: str
    paper: str
    equation: str
    estimator: str
    loss: str
    loss_agg_mode: str
    origin: str


ALGORITHMS = {
    name: Algorithm(
        name,
        a.papers[0],
        a.equation,
        a.estimator.name,
        a.loss.name,
        a.loss_agg_mode,
        "hpo_verl" if a.loss.token_loss else "verl",
    )
    for name, a in registry.ALGORITHMS.items()
}
LOSS_AGG_MODES = {name: loss.aggregations for name, loss in OUR_LOSSES.items()}
HYSTERETIC_ESTIMATORS = tuple(name for name, one in OUR_ESTIMATORS.items() if one.weights_by_sign)
ESTIMATOR_SECTIONS = {name: one.section for name, one in OUR_ESTIMATORS.items()}
HOMOGENEOUS_LOSSES = tuple(name for name, one in LOSSES.items() if one.proportional)
SELECTING_LOSSES = {name: one.caveat for name, one in LOSSES.items() if one.selects}
PENALISED_LOSSES = {
    name: one.caveat
    for name, one in LOSSES.items()
    if one.caveat and not one.proportional and not one.selects
}
AVERAGING_LOSSES = {
    name: one.caveat for name, one in LOSSES.items() if one.caveat and one.proportional
}
