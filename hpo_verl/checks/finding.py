"""What a check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hpo_verl.errors import CheckFailedError


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    `status` is `ok`; `warning`, the run starts but may not do what is meant; `error`, it would
    fail or learn nothing; `skipped`, the check could not be made. `detail` is what was seen, or
    why it was skipped; `fix` what to do about it. The list of checks names a finding without name.
    """

    name: str
    status: Literal["ok", "warning", "error", "skipped"]
    detail: str
    fix: str = ""

    @property
    def line(self) -> str:
        """The finding on one line."""
        text = f"{self.name}: {self.detail}"
        return f"{text}; {self.fix}" if self.fix else text


def ok(detail: str, name: str = "") -> Finding:
    """A check that found nothing wrong."""
    return Finding(name, "ok", detail)


def warning(detail: str, fix: str, name: str = "") -> Finding:
    """Something that runs but may not do what is meant."""
    return Finding(name, "warning", detail, fix)


def error(detail: str, fix: str, name: str = "") -> Finding:
    """Something with which the run fails or learns nothing."""
    return Finding(name, "error", detail, fix)


def skipped(reason: str, name: str = "") -> Finding:
    """A check that could not be made."""
    return Finding(name, "skipped", reason)


def one_line(problem: BaseException) -> str:
    """An exception's message, or its name where it has none, on one line of bounded length."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 500 else text[:497] + "..."


def raise_first_error(findings: Iterable[Finding]) -> list[str]:
    """Return a line for each warning; at the first error no later finding is asked for.

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
