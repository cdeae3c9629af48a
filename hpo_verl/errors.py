"""Errors that name what is wrong and what would be right, and the exit codes of the command.

Each is also a `ValueError` or `RuntimeError`, so that callers that know
nothing of this package can catch it, and each survives pickling by Ray.
"""

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class HpoVerlError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(HpoVerlError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another."""


class DataError(HpoVerlError, ValueError):
    """A file, row, column or tensor does not hold what it must."""


class EnvironmentCheckError(HpoVerlError, RuntimeError):
    """The machine or the installed packages cannot run what was asked for."""


class CheckFailedError(HpoVerlError, ValueError):
    """A check found something with which a run fails or learns nothing."""


class TrainingFailed(HpoVerlError, RuntimeError):
    """verl's process, or the job on a cluster, ended with an error."""

    exit_code = EXIT_FAILED


class TrainingStopped(HpoVerlError):
    """The run ended early, with a checkpoint, because it was asked to."""

    exit_code = EXIT_INTERRUPTED


class WeightSyncError(HpoVerlError, RuntimeError):
    """The rollout server did not receive the actor's weights."""


class RewardError(HpoVerlError, RuntimeError):
    """The reward function fails on too many responses."""


class NotFiniteError(HpoVerlError, RuntimeError):
    """Too many updates in a row met NaN or infinity in their loss or gradient."""


def printable(text: object) -> str:
    """A text with escapes for what moves a terminal's cursor or has no code; lines are kept."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1]
        for letter in str(text)
    )
