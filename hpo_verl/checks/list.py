"""The one list of checks. The doctor prints all findings; whoever trains raises the first error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hpo_verl.checks import (
    adapter,
    cluster,
    configuration,
    data,
    keys,
    loaded,
    machine,
    packages,
    prompts,
    storage,
    values,
)
from hpo_verl.checks.finding import Finding, error, one_line, raise_first_error, skipped
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.prepare import Preparation, make_missing, missing, preparations
from hpo_verl.errors import HpoVerlError

Need = Literal["here", "own ray", "data", "policy", "verl", "ray"]
THE_OTHERS = "other checks"


@dataclass(frozen=True)
class Check:
    """One check of the list.

    `look` returns what it found; an `HpoVerlError` that it raises is an error, and `fix` what to do
    about it. `name` is that of findings that have none of their own.

    Attributes:
        needs: `here`, it looks at this machine; `own ray`, at what a Ray of its own would have
            here; `data` and `policy`, at these files here; `verl`, it imports verl, which takes
            seconds; `ray`, it asks Ray's workers, unless an error was found before.
        after: names of findings without which it cannot be made.
        vital: whether no other check can be made if it finds an error.
        again: whether it can say more once data and policy are there.
    """

    name: str
    look: Callable[[PlannedRun], Finding | list[Finding]]
    needs: tuple[Need, ...] = ()
    after: tuple[str, ...] = ()
    fix: str = ""
    vital: bool = False
    again: bool = False

    @property
    def is_quick(self) -> bool:
        """Whether it neither reads data or models nor imports verl."""
        return {"here", "own ray"}.issuperset(self.needs)


DRIVER = "repair the driver, or ask the machine's owner"
KNOWN_MODEL = "a model that transformers knows"
TOGETHER, CORRECT = "see docs/pages/algorithms.md", "correct the override"
SCHEMA = (
    'a row needs data_source, prompt=[{"role": "user", "content": TEXT}] and '
    "reward_model={ground_truth}"
)
CURRICULUM = "another data.curriculum, or rows with that number in extra_info"
HINTS = "another actor_rollout_ref.rollout.custom.hints, or rows with that text in extra_info"
# What is quick comes first.
CHECKS = (
    Check("python", packages.check_base, vital=True),
    Check("recipe", configuration.check_recipe, fix=f"see `hpo-verl list`, {CORRECT}", vital=True),
    Check("code", loaded.check_code, vital=True),
    Check("settings", values.check_settings, fix=CORRECT, vital=True),
    Check("keys", keys.check_keys),
    Check("older keys", values.check_older_keys),
    Check("adapter", adapter.check_adapter),
    Check("learning", configuration.check_learnable),
    Check("records", configuration.check_records),
    Check("steps", configuration.check_steps, again=True),
    Check("lengths", configuration.check_lengths),
    Check("paths", storage.check_paths),
    Check("address", cluster.check_address, ("here",), (), f"{CORRECT}, or start the cluster"),
    Check("cards", machine.check_here, ("own ray",), (), DRIVER, again=True),
    Check("packages", packages.check_packages, ("here",)),
    Check("modules", packages.check_modules, ("here",)),
    Check("folders", storage.check_folders, ("here",)),
    Check("disk", storage.check_disk, ("here",), ("folders",), again=True),
    Check("shared memory", storage.check_shared_memory, ("own ray",)),
    Check("ports", storage.check_ports, ("own ray",)),
    Check("data files", data.check_files, ("data",)),
    Check("schema", data.check_schema, ("data",), ("data files",), SCHEMA),
    Check("model", loaded.check_model, ("policy",)),
    Check("remote code", loaded.check_model_code, ("policy",), (), KNOWN_MODEL),
    Check("positions", loaded.check_positions, ("policy",)),
    # After them: it asks the algorithm's record what it reads of a reward, which loads torch.
    Check("reward", data.check_reward, ("data",), ("schema",)),
    Check("plugin", packages.check_plugin, ("verl",)),
    Check("driver", packages.check_driver, ("here", "verl"), (), DRIVER),
    Check("names", configuration.check_names, ("verl",), ("plugin",)),
    Check("algorithm", configuration.check_algorithm, ("verl",), ("names",), TOGETHER),
    Check("verl's checks", configuration.check_with_verl, ("verl",), ("names",), CORRECT),
    Check("tokenizer", loaded.check_tokenizer, ("policy", "verl"), ("model", "remote code")),
    Check("prompts", prompts.check_prompts, ("data", "policy", "verl"), ("schema", "tokenizer")),
    Check("curriculum", prompts.check_curriculum, ("data", "verl"), ("schema",), CURRICULUM),
    Check("hints", prompts.check_hints, ("data", "policy", "verl"), ("prompts",), HINTS),
    Check("openings", prompts.check_openings, ("data", "policy", "verl"), ("prompts", "algorithm")),
    Check(cluster.NAME, cluster.check_cluster, ("verl", "ray")),
)
# What is known without asking Ray, and of that what is known on any machine.
BEFORE_RAY = tuple(check for check in CHECKS if "ray" not in check.needs)
ANYWHERE = tuple(check for check in BEFORE_RAY if {"verl"}.issuperset(check.needs))


def run_checks(run: PlannedRun, checks: Iterable[Check] = BEFORE_RAY) -> Iterator[Finding]:
    """Make checks in their order, and yield each finding as soon as it is made."""
    errors: list[str] = []
    skips: list[str] = []
    for check in checks:
        before = len(errors)
        for finding in _look(run, check, errors, skips):
            named = replace(finding, name=finding.name or check.name)
            if named.status in ("error", "skipped"):
                (errors if named.status == "error" else skips).append(named.name)
            yield named
        if check.vital and len(errors) > before:
            yield skipped(f"not looked at because of {errors[before]}", THE_OTHERS)
            return


def _look(run: PlannedRun, check: Check, errors: list[str], skips: list[str]) -> list[Finding]:
    if "own ray" in check.needs and run.address:
        # What a cluster offers is for its nodes to say.
        return []
    missed = [name for name in check.after if name in errors or name in skips]
    missed = errors if "ray" in check.needs else missed
    if missed:
        return [skipped(f"not looked at because of {missed[0]}")]
    try:
        found = check.look(run)
    except HpoVerlError as problem:
        return [error(one_line(problem), check.fix)]
    return found if isinstance(found, list) else [found]


def check_quickly(run: PlannedRun) -> list[str]:
    """Make the checks that neither read data or models nor import verl; see `raise_first_error`."""
    return raise_first_error(run_checks(run, (check for check in CHECKS if check.is_quick)))


def make_and_check(run: PlannedRun, announce: Callable[[str], None]) -> list[str]:
    """Make the other checks, and between them what the recipe makes and is missing.

    Nothing is made for a configuration of which something else is wrong; it has passed
    `check_quickly`. Returns a line for each warning.
    """
    parts, slow = awaited(run), [check for check in BEFORE_RAY if not check.is_quick]
    lines = raise_first_error(run_checks(run, [c for c in slow if parts.isdisjoint(c.needs)]))
    if parts:
        make_missing(run.config, announce)
        then = [check for check in BEFORE_RAY if check.again or not parts.isdisjoint(check.needs)]
        # Another object: what the first one knows of the files is out of date.
        lines += raise_first_error(run_checks(replace(run, composed=run.whole), then))
    return list(dict.fromkeys(lines))


def awaited(run: PlannedRun) -> set[Need]:
    """What the recipe makes and is not there yet."""
    outputs = [preparation.output for preparation in missing(run.config)]

    def is_made(paths: Iterable[Path]) -> bool:
        return any(path.is_relative_to(output) for path in paths for output in outputs)

    data = is_made(path for _, path in run.data_files)
    parts: dict[Need, bool] = {"data": data, "policy": is_made([run.policy_folder])}
    return {part for part, made in parts.items() if made}


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
    run = PlannedRun(recipe, tuple(overrides))

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
