"""Errors that name what is wrong and what would be right.

Each is also a `ValueError` or `RuntimeError`, so that callers that know
nothing of this package can catch it, and each survives pickling by Ray.
"""


class HpoVerlError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(HpoVerlError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another."""


class DataError(HpoVerlError, ValueError):
    """A file, row, column or tensor does not hold what it must."""


class EnvironmentCheckError(HpoVerlError, RuntimeError):
    """The machine or the installed packages cannot run what was asked for."""


class CheckFailedError(HpoVerlError, ValueError):
    """A check found something with which a run fails or learns nothing."""


class WeightSyncError(HpoVerlError, RuntimeError):
    """The rollout server did not receive the actor's weights."""


class RewardError(HpoVerlError, RuntimeError):
    """The reward function fails on too many responses."""


class NotFiniteError(HpoVerlError, RuntimeError):
    """Too many updates in a row met NaN or infinity in their loss or gradient."""
