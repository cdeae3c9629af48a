"""What a check found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from hpo_verl.errors import CheckFailedError, HpoVerlError

Status = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        status: `ok`; `warning`, the run starts but may not do what is meant; `error`, it
            would fail or learn nothing; `skipped`, the check could not be made.
        detail: what was seen, with its figures; for `skipped`, the reason.
        fix: what to do about it; empty for `ok`.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing wrong was found."""
        return self.status == "ok"

    @property
    def line(self) -> str:
        """The finding on one line."""
        text = f"{self.name}: {self.detail}"
        return f"{text}; {self.fix}" if self.fix else text


def ok(name: str, detail: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(name, "ok", detail)


def warning(name: str, detail: str, fix: str) -> Finding:
    """Something that runs but may not do what is meant."""
    return Finding(name, "warning", detail, fix)


def error(name: str, detail: str, fix: str) -> Finding:
    """Something with which the run fails or learns nothing."""
    return Finding(name, "error", detail, fix)


def skipped(name: str, reason: str, fix: str = "") -> Finding:
    """A check that could not be made."""
    return Finding(name, "skipped", reason, fix)


def attempt(name: str, check: Callable[[], str], fix: str) -> Finding:
    """Run a check that raises what it finds.

    Args:
        name: what is checked.
        check: returns the detail of `ok`, or raises an `HpoVerlError`.
        fix: what to do if it raises.
    """
    try:
        return ok(name, check())
    except HpoVerlError as problem:
        return error(name, str(problem), fix)


def first_line(problem: BaseException) -> str:
    """An exception's message, or its name where it has none, on one line of bounded length."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 500 else text[:497] + "..."


def demand(findings: Iterable[Finding]) -> list[str]:
    """Take what was found for granted, or say what forbids it.

    Returns:
        A line for each warning.

    Raises:
        CheckFailedError: the first error, as the doctor says it.
    """
    warnings = []
    for finding in findings:
        if finding.status == "error":
            raise CheckFailedError(finding.line)
        if finding.status == "warning":
            warnings.append(f"warning: {finding.line}")
    return warnings
