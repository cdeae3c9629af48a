"""Makes the data and the policy that a recipe names, where they are missing.

A recipe lists under `prepare` what it can make:

    prepare:
      data:
        module: data_prep.countdown
        output: /folder
        arguments: {numbers: 3, seed: 0}

Each entry is one command, `python -m data_prep.countdown --out /folder
--numbers 3 --seed 0`, whose output folder must hold the files that the recipe
reads.
"""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hpo_verl.child import module_arguments
from hpo_verl.config.settings import leaves
from hpo_verl.errors import ConfigError, DataError

PERMITTED_PREFIX = "data_prep."


@dataclass(frozen=True)
class Preparation:
    """One command that makes something a recipe needs: an entry under `prepare`."""

    name: str
    module: str
    output: Path
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The command line to run."""
        return [sys.executable, *module_arguments(self.module), *self._options]

    @property
    def shown(self) -> str:
        """The command as a user types it."""
        return shlex.join(["python", "-m", self.module, *self._options])

    @property
    def _options(self) -> list[str]:
        return ["--out", str(self.output), *self.arguments]


def preparations(config: DictConfig) -> Iterator[Preparation]:
    """The commands that a composed recipe lists, and whose output it names elsewhere.

    A recipe that was given another policy or other data does not need those it lists.
    """
    whole = dict(leaves(OmegaConf.to_container(config, resolve=True)))
    for name, entry in (OmegaConf.select(config, "prepare") or {}).items():
        used = (value for key, value in whole.items() if key != f"prepare.{name}.output")
        if not any(_lies_in(value, str(entry.output)) for value in used):
            continue
        if not str(entry.module).startswith(PERMITTED_PREFIX):
            raise ConfigError(
                f"prepare.{name}.module={entry.module}: only modules below {PERMITTED_PREFIX[:-1]}"
            )
        arguments: list[str] = []
        for key, value in (entry.get("arguments") or {}).items():
            arguments += [f"--{key.replace('_', '-')}", str(value)]
        yield Preparation(name, entry.module, Path(entry.output).expanduser(), tuple(arguments))


def _lies_in(value: object, folder: str) -> bool:
    return isinstance(value, str) and (value == folder or value.startswith(f"{folder}/"))


def missing(config: DictConfig) -> list[Preparation]:
    """Those preparations whose output folder does not exist."""
    return [preparation for preparation in preparations(config) if not preparation.output.exists()]


def check_made(config: DictConfig) -> None:
    """Let the modules under `prepare` check what they made: those that offer `check(folder)`.

    Raises:
        DataError: names the file that was changed.
    """
    for preparation in preparations(config):
        check = getattr(importlib.import_module(preparation.module), "check", None)
        if check is not None and preparation.output.exists():
            check(preparation.output)


def make_missing(config: DictConfig, announce: Callable[[str], None]) -> None:
    """Run the commands whose output is missing, and announce each.

    A module under `prepare` may offer `made(folder)`, which is told what it has just made.

    Raises:
        DataError: a command failed.
    """
    for preparation in missing(config):
        announce(f"making {preparation.name}: {preparation.shown}")
        code = subprocess.run(preparation.command, check=False).returncode  # noqa: S603
        if code != 0:
            text = f"prepare.{preparation.name}: exit code {code} from {preparation.shown}"
            raise DataError(text)
        if made := getattr(importlib.import_module(preparation.module), "made", None):
            made(preparation.output)
