"""`hpo-verl prepare`: what a recipe needs, made or found sound, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hpo_verl.checks.finding import raise_first_error
from hpo_verl.checks.list import CHECKS, awaited, run_checks
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.prepare import Preparation, make_missing, preparations


def prepare_recipe(
    recipe: str, overrides: Sequence[str], announce: Callable[[str], None]
) -> list[Preparation]:
    """Make what a recipe lists under `prepare` where it is missing, and check what is there.

    Returns:
        Everything that the recipe lists; all of it is there now.

    Raises:
        HpoVerlError: a wrong recipe or override; a command failed; something that was there
            is damaged.
    """
    run = PlannedRun(recipe, tuple(overrides), Path())

    def check(*names: str) -> None:
        raise_first_error(run_checks(run, (check for check in CHECKS if check.name in names)))

    check(*(check.name for check in CHECKS if check.vital))
    wanted = list(preparations(run.config))
    if "data" not in awaited(run):
        # Before gigabytes of a policy are fetched.
        check("data files")
    make_missing(run.config, announce)
    check("data files", *(["model", "remote code"] if run.maker(run.policy_folder) else []))
    return wanted
