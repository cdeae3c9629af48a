"""From a recipe's name to a resolved configuration that runs nobody else's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_verl.checks.code import check_code, check_targets
from hpo_verl.checks.finding import Finding, demand, error, first_line, ok
from hpo_verl.checks.versions import check_base
from hpo_verl.config.recipes import compose_recipe, without_hydra
from hpo_verl.errors import ConfigError
from hpo_verl.runs.quiet import quiet_imports

FIX = "see `hpo-verl list`, and correct the override"


def compose_checked(recipe: str, overrides: Sequence[str]) -> tuple[DictConfig, list[Finding]]:
    """Compose a recipe quietly, and see whose code it names.

    Returns:
        What verl reads of it, resolved, and the findings; empty where one of them is an error.
    """
    try:
        with quiet_imports():
            whole = compose_recipe(recipe, overrides)
    except ConfigError as problem:
        return OmegaConf.create(), [error("recipe", first_line(problem), FIX)]
    return checked_composition(whole)


def checked_composition(whole: DictConfig) -> tuple[DictConfig, list[Finding]]:
    """Resolve a composed configuration, after a look at what it would call.

    Args:
        whole: the composed configuration, Hydra's own part included.

    Returns:
        As `compose_checked`.
    """
    # Before anything of the configuration is instantiated or imported.
    targets = check_targets(OmegaConf.to_container(whole, resolve=False))
    config = without_hydra(whole)
    try:
        OmegaConf.resolve(config)
    except Exception as problem:
        return OmegaConf.create(), [targets, error("recipe", first_line(problem), FIX)]
    plain: Any = OmegaConf.to_container(config)
    return config, [ok("recipe", "it composes"), targets, check_code(plain)]


def compose_resolved(recipe: str, overrides: Sequence[str]) -> tuple[DictConfig, list[Finding]]:
    """Compose a recipe for this machine's Python and verl.

    Returns:
        What verl reads of it, resolved, and what was found, none of it an error.

    Raises:
        CheckFailedError: the first error.
    """
    base = check_base()
    demand(base)
    config, found = compose_checked(recipe, overrides)
    demand(found)
    return config, [*base, *found]
