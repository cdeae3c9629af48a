"""What the shell offers behind `hpo-verl train` and the other commands of a recipe."""

from __future__ import annotations

from hpo_verl.config.recipes import GROUPS, group_options, recipe_names


def recipes(incomplete: str) -> list[str]:
    """Recipes whose name begins so."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


def overrides(incomplete: str) -> list[str]:
    """Group overrides such as `algo=a_hpo` that begin so; single settings are too many."""
    group, separator, _ = incomplete.partition("=")
    if not separator:
        return [f"{name}=" for name in GROUPS if name.startswith(incomplete)]
    options = group_options(group) if group in GROUPS else []
    return [text for name in options if (text := f"{group}={name}").startswith(incomplete)]
