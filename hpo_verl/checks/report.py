"""The doctor's findings, for people and for machines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from hpo_verl.checks.finding import Finding
from hpo_verl.installed import package_versions

ORDER = ("error", "warning", "skipped", "ok")


def as_text(findings: Sequence[Finding]) -> str:
    """One line a finding, its fix below it, and the counts at the end."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':<8} {'':<{width}}  fix: {finding.fix}")
    counts = Counter(finding.status for finding in findings)
    lines.append(", ".join(_count(counts[status], status) for status in ORDER if counts[status]))
    return "\n".join(lines)


def _count(number: int, status: str) -> str:
    plural = "s" if number > 1 and status in ("error", "warning") else ""
    return f"{number} {status}{plural}"


def as_json(
    recipe: str | None, overrides: Sequence[str], address: str | None, findings: Sequence[Finding]
) -> str:
    """One JSON document.

    Returns:
        Keys recipe, overrides, address, status (the worst of `error`, `warning`, `ok`; a check
        that was skipped is none of them), counts, versions and findings, each with name, status,
        detail and fix.
    """
    counts = Counter(finding.status for finding in findings)
    document = {
        "recipe": recipe,
        "overrides": list(overrides),
        "address": address,
        "status": next((s for s in ("error", "warning") if counts[s]), "ok"),
        "counts": {status: counts[status] for status in ORDER},
        "versions": package_versions(),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(document, indent=2)
