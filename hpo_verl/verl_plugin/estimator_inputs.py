"""What an estimator needs beyond verl's arguments, and what it reports.

verl hands an estimator rewards, mask, uids and settings, and takes nothing back
but advantages. A trainer mode of ours knows more: the entropy of every token,
the step, values of prompts. It lends these for the duration of one call, and
collects numbers for the metrics of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hpo_verl.errors import ConfigError

_ANY_OF_OURS = ("hpo_sync", "hpo_colocate_async", "hpo_separate_async")
BORROWING_ESTIMATORS: dict[str, tuple[str, ...]] = {
    "aepo_advantage": _ANY_OF_OURS,
    "d3s": _ANY_OF_OURS,
    # In the others prompts are drawn long before their values are updated.
    "spo": ("hpo_sync",),
}
"""Estimators that need what only a trainer lends, and the trainer modes that do."""

BORROWING_LOSSES: dict[str, tuple[str, ...]] = {"hapo": _ANY_OF_OURS}
"""The same of losses."""

_lent: ContextVar[dict[str, Any] | None] = ContextVar("hpo_verl_estimator_inputs", default=None)


@contextmanager
def lend(**values: Any) -> Iterator[dict[str, float]]:
    """Lend values to the estimator that is called inside, besides what is lent already.

    Args:
        **values: By name.

    Yields:
        What the estimator reports, filled when it has run.
    """
    reported: dict[str, float] = {}
    token = _lent.set({**(_lent.get() or {}), **values, "reported": reported})
    try:
        yield reported
    finally:
        _lent.reset(token)


def borrow(estimator: str, name: str) -> Any:
    """Take a lent value.

    Args:
        estimator: Who asks, for the message.
        name: Name of the value; `reported` is where numbers for the metrics go.

    Returns:
        The value.

    Raises:
        ConfigError: Nothing is lent, since the trainer mode is not ours.
    """
    values = _lent.get()
    if values is None or name not in values:
        raise ConfigError(
            f"algorithm.adv_estimator = {estimator!r} needs {name} from the trainer: "
            f"trainer.v1.trainer_mode must be {' or '.join(BORROWING_ESTIMATORS[estimator])}"
        )
    return values[name]
