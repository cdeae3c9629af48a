"""The one list of checks. The doctor prints all findings; whoever trains raises the first error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hpo_verl.checks import configuration, data, imports, machine, model, plugin, storage, versions
from hpo_verl.checks.finding import Finding, demand, skipped
from hpo_verl.checks.subject import Subject
from hpo_verl.config.prepare import make_missing, missing

Need = Literal["here", "own ray", "data", "policy", "verl"]
THE_OTHERS = "other checks"


@dataclass(frozen=True)
class Check:
    """One check of the list.

    Attributes:
        name: of its finding, or of what its findings are about.
        look: returns what it found.
        needs: `here`, it looks at this machine; `own ray`, it is about a Ray that the run starts
            here; `data` and `policy`, it reads these files; `verl`, it imports verl, which takes
            seconds.
        after: names of findings without which it cannot be made.
        again: whether it can say more once data and policy are there.
    """

    name: str
    look: Callable[[Subject], Finding | list[Finding]]
    needs: frozenset[Need] = frozenset()
    after: tuple[str, ...] = ()
    again: bool = False

    @property
    def quick(self) -> bool:
        """Whether it neither reads data or models nor imports verl."""
        return self.needs <= {"here", "own ray"}


def _check(
    name: str,
    look: Callable[[Subject], Finding | list[Finding]],
    *needs: Need,
    after: Sequence[str] = (),
    again: bool = False,
) -> Check:
    return Check(name, look, frozenset(needs), tuple(after), again)


def _packages(subject: Subject) -> list[Finding]:
    return versions.check_packages("cpu" if subject.on_cpu else "cuda", subject.needs_vllm)


def _cpu_backend(subject: Subject) -> list[Finding]:
    return [versions.check_cpu_backend()] if subject.on_cpu else []


def _plugin(subject: Subject) -> Finding:
    del subject  # In this process, whatever is to run.
    return plugin.check_here()


# What is quick comes first.
CHECKS = (
    _check("settings", configuration.check_settings),
    _check("learning", configuration.check_learnable),
    _check("steps", configuration.check_steps, again=True),
    _check("lengths", configuration.check_lengths),
    _check("paths", storage.check_paths),
    _check("machine", machine.check_here, "here", "own ray", again=True),
    _check("packages", _packages, "here"),
    _check("cpu backend", _cpu_backend, "here"),
    _check("modules", imports.check_modules, "here"),
    _check("folders", storage.check_folders, "here"),
    _check("disk", storage.check_disk, "here", after=["folders"], again=True),
    _check("shared memory", storage.check_shared_memory, "here", "own ray"),
    _check("ports", storage.check_ports, "here", "own ray"),
    _check("data files", data.check_files, "here", "data"),
    _check("schema", data.check_schema, "here", "data", after=["data files"]),
    _check("reward", data.check_reward, "here", "data", after=["schema"]),
    _check("model", model.check_model, "here", "policy"),
    _check("plugin", _plugin, "verl"),
    _check("driver", imports.check_driver, "here", "verl"),
    _check("names", configuration.check_names, "verl", after=["plugin"]),
    _check("algorithm", configuration.check_algorithm, "verl", after=["names"]),
    _check("verl's checks", configuration.check_with_verl, "verl", after=["names"]),
    _check("prompts", data.check_prompts, "here", "data", "policy", "verl", after=["schema"]),
)


def run_checks(subject: Subject, checks: Iterable[Check] = CHECKS) -> Iterator[Finding]:
    """Make checks in their order.

    Args:
        subject: what is looked at.
        checks: those of the list that are to be made.

    Yields:
        Their findings, each as soon as it is made.
    """
    if subject.on_cpu:
        # Before verl is imported.
        os.environ["VERL_PLATFORM"] = "cpu"
    missed: set[str] = set()
    for check in checks:
        if "own ray" in check.needs and subject.address:
            # What a cluster offers is for its nodes to say.
            continue
        reason = _obstacle(subject, check, missed)
        found = skipped(check.name, reason) if reason else check.look(subject)
        for finding in found if isinstance(found, list) else [found]:
            if finding.status in ("error", "skipped"):
                missed.add(finding.name)
            yield finding
        if check.name == "settings" and "settings" in missed:
            yield skipped(THE_OTHERS, "the settings are out of range")
            return


def _obstacle(subject: Subject, check: Check, missed: set[str]) -> str:
    """Why a check cannot be made now; empty if it can."""
    if "here" in check.needs and not subject.here:
        return f"this is not a machine of {subject.address}; run the doctor on one of them"
    if before := [name for name in check.after if name in missed]:
        return f"not looked at because of {before[0]}"
    return ""


def check_quickly(subject: Subject) -> list[str]:
    """Make the checks that neither read data or models nor import verl.

    Returns:
        A line for each warning.

    Raises:
        CheckFailedError: the first error, as the doctor says it.
    """
    return demand(run_checks(subject, (check for check in CHECKS if check.quick)))


def make_and_check(subject: Subject, announce: Callable[[str], None]) -> list[str]:
    """Make the other checks, and between them what the recipe makes and is missing.

    Nothing is made for a configuration of which something else is wrong.

    Args:
        subject: what is to run, and has passed `check_quickly`.
        announce: told what is being made.

    Returns:
        A line for each warning.

    Raises:
        CheckFailedError: the first error, as the doctor says it.
        DataError: a command that was to make something failed.
    """
    parts = awaited(subject)
    now = [check for check in CHECKS if not check.quick and not check.needs & parts]
    lines = demand(run_checks(subject, now))
    if parts:
        make_missing(subject.config, announce)
        # Another object: what the first one knows of the files is out of date.
        then = [check for check in CHECKS if check.again or not (check.quick or check in now)]
        lines += demand(run_checks(replace(subject), then))
    return list(dict.fromkeys(lines))


def awaited(subject: Subject) -> frozenset[Need]:
    """What the recipe makes and is not there yet."""
    absent = {preparation.output for preparation in missing(subject.config)}
    parts: list[Need] = []
    if any(path.is_relative_to(output) for _, path in subject.data_files for output in absent):
        parts.append("data")
    if any(subject.policy_folder.is_relative_to(output) for output in absent):
        parts.append("policy")
    return frozenset(parts)
