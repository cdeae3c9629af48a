"""The one channel for what an estimator or a loss needs beyond verl's arguments.

A trainer mode of ours provides values to the estimator while it runs on the driver, an engine or
a loss function of ours to the loss while it runs in a worker. TransferQueue only carries what the
driver makes for the workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hpo_verl.errors import ConfigError

MINI_BATCH = "mini_batch"
"""Result of a loss's sums over its whole mini-batch."""

REPORT = "report"
"""Function that an estimator's call is handed to; see `advantages.Estimate`."""

SCORES = "scores"
"""Token-level rewards before a KL penalty, `[batch, response]`."""

FINAL = "final"
"""Row of the final output of each output's session, `[batch]` int64."""

SESSION = "session"
"""Number of each output's session among those of its prompt, `[batch]` int64."""

OUTPUT = "output"
"""Number of each output among those of its session, `[batch]` int64."""

EARLIER = "earlier"
"""`Rollout` of each earlier part of the last step's worth of responses."""

TEMPERATURES = "hpo_temperatures"
"""Column of a training prompt: JSON, factors on the temperature of its first samples."""

OPENINGS = "hpo_openings"
"""Column of a training prompt: JSON, (text, whole) of the openings of its first samples."""

OPENING = "opening"
"""Number of each output's opening, `[batch]` int64; also its name among verl's `extra_fields`."""

TEMPERATURE_RULE = "hpo_temperature_rule"
"""Column of a training prompt: JSON, the entries of a `TokenTemperature`; and their name among the
sampling parameters of the rollout `hf`."""

_provided: ContextVar[Mapping[str, Any]] = ContextVar("hpo_verl_extras", default={})  # noqa: B039


@contextmanager
def provide(**values: Any) -> Iterator[None]:
    """Provide values by name to what is called inside, besides those of the outer call."""
    token = _provided.set({**_provided.get(), **values})
    try:
        yield
    finally:
        _provided.reset(token)


def get(name: str) -> Any:
    """Return what is provided under a name; None if nothing is."""
    return _provided.get().get(name)


def require(name: str, who: str, source: str) -> Any:
    """Return what is provided under a name.

    Raises:
        ConfigError: Nothing is. Its text: `who` (a setting) needs `source` (what would provide it).
    """
    value = get(name)
    if value is None:
        raise ConfigError(f"{who} needs {source}")
    return value
