"""Makes the data and the policy that a recipe names, where they are missing.

A recipe lists under `prepare` what it can make:

    prepare:
      data:
        module: data_prep.countdown
        output: /folder
        arguments: {numbers: 3, seed: 0}

Each entry is one command, `python -m data_prep.countdown --out /folder
--numbers 3 --seed 0`, which leaves a manifest beside its files; the arguments
are added to it. What a manifest lists is made again where it is gone or breaks
off. Whatever else is in the folder stays as it is.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open

from data_prep.command import ERROR, ERRORS_ON_STDOUT, check_output, staging
from data_prep.manifest import PREPARED, file_faults, read_manifest
from hpo_verl.child import module_arguments
from hpo_verl.config.settings import leaves
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.runs.files import locked, remember_sha256, sha256_once, write_atomically

PERMITTED_PREFIX = "data_prep."
LAST = ("policy", "warm_start")


@dataclass(frozen=True)
class Preparation:
    """One command that makes something a recipe needs: an entry under `prepare`.

    `needed` is what the recipe reads of the output: files, or the folder itself.
    """

    name: str
    module: str
    output: Path
    arguments: Mapping[str, str]
    needed: tuple[Path, ...]

    def command(self, out: Path | None = None) -> list[str]:
        """The command line to run; with another folder than the output if one is given."""
        return [sys.executable, *module_arguments(self.module), *self._options(out or self.output)]

    @property
    def shown(self) -> str:
        """The command as a user types it."""
        return shlex.join(["python", "-m", self.module, *self._options(self.output)])

    @property
    def way_out(self) -> str:
        """What to do where something else is in the place of the output; it loses no data."""
        return f"name another folder with prepare.{self.name}.output=, or move {self.output} away"

    def _options(self, out: Path) -> list[str]:
        return ["--out", str(out), *(text for pair in self.arguments.items() for text in pair)]

    @property
    def _manifest(self) -> str:
        return getattr(importlib.import_module(self.module), "MANIFEST", PREPARED)

    def look(self) -> tuple[bool, str]:
        """Whether the command is to be run, and what is there that it must not overwrite.

        Only what a command made, and what is now gone or breaks off, is made again.
        """
        if os.path.exists(self.output) and not self.output.is_dir():
            return True, f"{self.output} is a file; a folder is needed"
        try:
            manifest = read_manifest(self.output, self._manifest)
        except DataError:
            # What is there is the user's own.
            is_due = not all(map(_holds_something, self.needed))
            others = sorted(self.output.glob("[!.]*")) if is_due else []
            return is_due, f"{others[0]} was not made by hpo-verl prepare" if others else ""
        if change := self._change(manifest):
            return False, f"{self.output} was made with {change}"
        faults = dict(file_faults(self.output, self._manifest, manifest))
        changed = [path for path in faults if path.exists() and not _breaks_off(path)]
        return len(faults) > len(changed), faults[changed[0]] if changed else ""

    def _change(self, manifest: Mapping[str, Any]) -> str:
        """What the command was told and would be told now, where they differ."""
        version = getattr(importlib.import_module(self.module), "RECIPE_VERSION", None)
        now = _by_content(self.arguments)
        # Who ran the command himself did not tell.
        made = manifest.get("arguments", now)
        told = {"recipe_version": (manifest.get("recipe_version"), version)}
        told |= {key: (made.get(key), now.get(key)) for key in {**made, **now}}
        for key, (was, wanted) in told.items():
            # A file that is gone cannot be compared: it is still a path.
            gone = str(was).startswith("sha256:") and Path(wanted or "").suffix
            if was != wanted and not gone:
                return f"{key} {was or 'left out'}, now {wanted or 'left out'}"
        return ""

    def make(self, announce: Callable[[str], None]) -> None:
        """Run the command, as soon as no other process does, if it is to be run then.

        Raises:
            DataError: the command failed, or something is in its way.
            EnvironmentCheckError: no lock can be had.
        """
        # A link may lead to a folder that is not there yet.
        output = Path(os.path.realpath(self.output))
        check_output(output.parent)
        lock = output.with_name(f".{output.name}.lock")
        with locked(lock, f"choose another with prepare.{self.name}.output=", wait=True):
            is_due, fault = self.look()
            if fault:
                raise DataError(f"prepare.{self.name}: {fault}; {self.way_out}")
            if not is_due:
                return
            announce(f"making {self.name}: {self.shown}")
            with staging(output.parent) as temporary:
                self._run(new := temporary / output.name, announce)
                made = {"arguments": _by_content(self.arguments)}
                made |= read_manifest(new, self._manifest)
                write_atomically(new / self._manifest, json.dumps(made, indent=2) + "\n")
                self._clear(output, announce)
                output.mkdir(exist_ok=True)
                # The manifest first: if this is killed, it says what is missing.
                for path in sorted(new.iterdir(), key=lambda path: path.name != self._manifest):
                    os.replace(path, output / path.name)
            for name, digest in made["files"].items():
                # The command has read it.
                remember_sha256(output / name, digest)

    def _run(self, out: Path, announce: Callable[[str], None]) -> None:
        done = subprocess.run(  # noqa: S603
            self.command(out),
            check=False,
            stdout=subprocess.PIPE,
            env={**os.environ, ERRORS_ON_STDOUT: "1"},
        )
        lines = (
            done.stdout.decode(errors="replace").replace(str(out), str(self.output)).splitlines()
        )
        if done.returncode != 0:
            said = lines[-1] if lines and lines[-1].startswith(ERROR) else ""
            problem = said.removeprefix(ERROR) or f"exit code {done.returncode}"
            raise DataError(f"prepare.{self.name}: {problem}, from {self.shown}")
        for line in lines:
            announce(line)

    def _clear(self, output: Path, announce: Callable[[str], None]) -> None:
        """Remove what was made before; what breaks off may be the user's own, and is kept."""
        try:
            manifest = read_manifest(output, self._manifest)
        except DataError:
            return
        for path, _ in file_faults(output, self._manifest, manifest):
            if path.exists():
                kept = Path(tempfile.mkdtemp(prefix=f"{output.name}.broken-", dir=output.parent))
                os.replace(path, kept / path.name)
                announce(f"{path} breaks off; it was moved to {kept}")
        for name in manifest["files"]:
            (output / name).unlink(missing_ok=True)


def _holds_something(path: Path) -> bool:
    # Path.is_file raises where a folder above may not be entered.
    return os.path.isfile(path) or (os.path.isdir(path) and any(path.glob("[!.]*")))


def _breaks_off(path: Path) -> bool:
    """Whether a file is empty or cannot be read to its end."""
    if not path.is_file() or not os.access(path, os.R_OK):
        return False
    try:
        if path.suffix == ".parquet":
            pq.read_metadata(path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                pass
    # Each library has errors of its own.
    except Exception:
        return True
    return path.stat().st_size == 0


def _by_content(arguments: Mapping[str, str]) -> dict[str, str]:
    """Arguments to be compared: a file counts by its content, wherever it lies."""
    return {
        key: f"sha256:{sha256_once(Path(value))}"
        if Path(value).suffix and os.path.isfile(value)
        else value
        for key, value in arguments.items()
    }


def preparations(config: DictConfig) -> Iterator[Preparation]:
    """The commands that a composed recipe lists, and whose output it names elsewhere.

    A recipe that was given another policy or other data does not need those it lists. Those in
    `LAST`, which may read what others make and take longest, are last.
    """
    whole = dict(leaves(OmegaConf.to_container(config, resolve=True)))
    listed = (OmegaConf.select(config, "prepare") or {}).items()
    entries = sorted(listed, key=lambda one: LAST.index(one[0]) if one[0] in LAST else -1)
    needs: dict[str, dict[Path, None]] = {}
    # A later one reads what an earlier one makes only if it is needed itself.
    for name, entry in reversed(entries):
        output = str(entry.output)
        others = (value for key, value in whole.items() if key != f"prepare.{name}.output")
        read = (Path(value).expanduser() for value in others if _lies_in(value, output))
        needs[name] = dict.fromkeys(read)
        if not needs[name]:
            whole = {k: v for k, v in whole.items() if not k.startswith(f"prepare.{name}.")}
    for name, entry in entries:
        output, needed = str(entry.output), needs[name]
        if not needed:
            continue
        if not str(entry.module).startswith(PERMITTED_PREFIX):
            raise ConfigError(
                f"prepare.{name}.module={entry.module}: only modules below {PERMITTED_PREFIX[:-1]}"
            )
        given = {
            key: str(value)
            for key, value in (entry.get("arguments") or {}).items()
            if value is not None
        }
        arguments = {f"--{key.replace('_', '-')}": value for key, value in given.items()}
        if not all(map(_holds_something, needed)):
            _check_arguments(name, entry.module, given, arguments)
        folder = Path(output).expanduser()
        yield Preparation(name, entry.module, folder, arguments, tuple(needed))


def _check_arguments(
    name: str, module: str, given: Mapping[str, str], arguments: Mapping[str, str]
) -> None:
    """Refuse a module that does not exist, or arguments that it does not take."""
    try:
        command = found = importlib.import_module(module)
        if hasattr(found, "__path__"):
            command = importlib.import_module(f"{module}.__main__")
        names = command.make_parser().names
    except (ModuleNotFoundError, AttributeError) as problem:
        raise ConfigError(f"prepare.{name}.module={module}: there is no such command") from problem
    for key, value in given.items():
        if key not in names:
            text = f"{module} takes no such argument; available: {', '.join(names)}"
            raise ConfigError(f"prepare.{name}.arguments.{key}={value}: {text}")
    try:
        getattr(found, "check_arguments", dict)(arguments)
    except ConfigError as problem:
        raise ConfigError(f"prepare.{name}: {problem}") from problem


def _lies_in(value: object, folder: str) -> TypeGuard[str]:
    return isinstance(value, str) and (value == folder or value.startswith(f"{folder}/"))


def missing(config: DictConfig) -> list[Preparation]:
    """Those preparations whose command is to be run."""
    return [preparation for preparation in preparations(config) if preparation.look()[0]]


def make_missing(config: DictConfig, announce: Callable[[str], None]) -> None:
    """Make what is missing, and announce each command; see `Preparation.make`."""
    # One may read what another makes.
    for preparation in preparations(config):
        if preparation.look()[0]:
            preparation.make(announce)
