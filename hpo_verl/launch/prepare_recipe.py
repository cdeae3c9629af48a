"""`hpo-verl prepare`: what a recipe needs, made or found sound, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpo_verl.launch import checks
from hpo_verl.launch.model_folders import policy_folder
from hpo_verl.launch.prepare import (
    Preparation,
    check_made,
    make_missing,
    missing,
    preparations,
)
from hpo_verl.launch.recipes import compose_resolved


def prepare_recipe(
    recipe: str, overrides: Sequence[str], announce: Callable[[str], None]
) -> list[Preparation]:
    """Make what a recipe lists under `prepare` where it is missing, and check what is there.

    Args:
        recipe: name of a recipe.
        overrides: Hydra overrides.
        announce: told what is being made.

    Returns:
        Everything that the recipe lists; all of it is there now.

    Raises:
        HpoVerlError: a wrong recipe or override; a command failed; something that was there
            is damaged.
    """
    checks.check_versions()
    config = compose_resolved(recipe, overrides)
    checks.check_numbers(config)
    wanted = list(preparations(config))
    absent = {preparation.output for preparation in missing(config)}
    if not absent & {path.parent for _, path in checks.data_files(config)}:
        # Before gigabytes of a policy are fetched.
        checks.check_data(config)
    make_missing(config, announce)
    checks.check_data(config)
    if any(preparation.output == policy_folder(config) for preparation in wanted):
        checks.check_model(config)
    check_made(config)
    return wanted
