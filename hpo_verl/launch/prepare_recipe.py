"""`hpo-verl prepare`: what a recipe needs, made or found sound, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hpo_verl.checks.checklist import awaited
from hpo_verl.checks.composition import compose_resolved
from hpo_verl.checks.configuration import check_settings
from hpo_verl.checks.data import check_files
from hpo_verl.checks.finding import demand
from hpo_verl.checks.model import check_model
from hpo_verl.checks.subject import Subject
from hpo_verl.config.prepare import Preparation, make_missing, preparations


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
    config, _ = compose_resolved(recipe, overrides)
    subject = Subject(recipe, tuple(overrides), config, Path())
    demand([check_settings(subject)])
    wanted = list(preparations(config))
    if "data" not in awaited(subject):
        # Before gigabytes of a policy are fetched.
        demand([check_files(subject)])
    make_missing(config, announce)
    demand([check_files(subject)])
    if subject.maker(subject.policy_folder):
        demand(check_model(subject))
    return wanted
