"""What a job takes along to a Ray cluster: this code, the recipes and the environment."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from hpo_verl.config.cluster import network_variables
from hpo_verl.config.recipes import recipes_directory
from hpo_verl.errors import EnvironmentCheckError

PACKAGES = ("hpo_verl", "data_prep")
TRAVELLING_SUFFIXES = (".py", ".yaml")
# Folders of the submitting machine that recipes read from the environment.
FOLDER_VARIABLES = ("HPO_VERL_CACHE", "HPO_VERL_CHECKPOINTS", "HF_HOME")


@contextlib.contextmanager
def staged_code() -> Iterator[Path]:
    """A temporary folder with all that travels: the packages' code and the recipes."""
    with tempfile.TemporaryDirectory(prefix="hpo-submit-") as folder:
        for name in PACKAGES:
            spec = importlib.util.find_spec(name)
            if spec is None or not spec.submodule_search_locations:
                raise EnvironmentCheckError(f"the package {name} is not installed")
            _copy_code(Path(spec.submodule_search_locations[0]), Path(folder) / name)
        _copy_code(recipes_directory(), Path(folder) / "recipes")
        yield Path(folder)


def _copy_code(source: Path, target: Path) -> None:
    for file in sorted(source.rglob("*")):
        inside = file.relative_to(source)
        hidden = any(part.startswith((".", "_recipes")) for part in inside.parts)
        if file.suffix in TRAVELLING_SUFFIXES and file.is_file() and not hidden:
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / inside)


def job_environment() -> dict[str, str]:
    """Environment variables of a job and of all its workers."""
    settings = OmegaConf.load(recipes_directory() / "ray" / "runtime_env.yaml")
    variables = {str(name): str(value) for name, value in settings.env_vars.items()}
    variables |= network_variables()
    for name in FOLDER_VARIABLES:
        if name in os.environ:
            variables[name] = str(Path(os.environ[name]).expanduser().absolute())
    return variables
