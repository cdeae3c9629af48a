"""Finds and composes recipes, and explains what does not compose."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpo_verl.config.overrides import (
    OWN_GROUPS,
    RUN_FOLDER_KEY,
    SEARCH_KEY,
    first_line,
    hydra_overrides,
    nearest,
    overridden_key,
    quoted,
)
from hpo_verl.errors import ConfigError, EnvironmentCheckError

GROUPS = ("task", "model", "algo", "hardware")
# What the group `run` brings, without which a run would be neither checked nor recorded.
_CALLBACK = "hydra.callbacks.preflight"
_NO_BASE = (
    "builds on no recipe; begin it with `defaults: [countdown-tiny, _self_]` or another of "
    "`hpo-verl list`"
)


def recipes_directory() -> Path:
    """Folder with the recipes: the repository's, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def verl_configurations() -> Path:
    """Folder of verl's own configurations, found without importing verl, which takes seconds."""
    found = find_spec("verl")
    if found is None or found.origin is None:
        raise EnvironmentCheckError("verl is not installed")
    return Path(found.origin).parent / "trainer" / "config"


@cache
def verl_defaults() -> DictConfig:
    """What verl composes without a recipe; not to be changed."""
    defaults = OmegaConf.load(verl_configurations() / "_generated_ppo_trainer.yaml")
    assert isinstance(defaults, DictConfig)  # noqa: S101 - for the type checker
    return defaults


def recipe_names() -> list[str]:
    """Names of the recipes: the YAML files at the top of the recipes' folder."""
    return sorted(path.stem for path in recipes_directory().glob("*.yaml"))


def is_file_name(recipe: str) -> bool:
    """Whether a recipe is given as a file of the user's, and not by a name of ours."""
    return os.sep in recipe or recipe.endswith((".yaml", ".yml"))


def recipe_file(recipe: str) -> Path:
    """The file of a recipe: one of ours by its name, or any other by its path.

    Raises:
        ConfigError: there is none; names those that look like it.
    """
    if not is_file_name(recipe):
        if recipe not in recipe_names():
            raise ConfigError(f"unknown recipe {recipe!r}: {nearest(recipe, recipe_names())}")
        return recipes_directory() / f"{recipe}.yaml"
    file = Path(recipe).expanduser().absolute()
    if "${" in str(file):
        raise ConfigError(f"recipe {recipe}: must have no ${{ in its path ({file})")
    if file.suffix == ".yaml" and file.is_file():
        return file
    if file.suffix != ".yaml" or file.is_dir():
        raise ConfigError(f"recipe {recipe}: must be a file NAME.yaml")
    there = [path.name for path in file.parent.glob("*.yaml")]
    seen = f"; {nearest(file.name, there)}" if there else ""
    raise ConfigError(f"recipe {recipe}: no such file{seen}")


def from_anywhere(recipe: str) -> str:
    """A recipe's name, or its file as it is called in another working folder."""
    return str(recipe_file(recipe)) if is_file_name(recipe) else recipe


def hydra_arguments(recipe: str) -> list[str]:
    """Arguments of a program of Hydra's, such as verl's, that compose as `compose_recipe` does."""
    file = recipe_file(recipe)
    # With a slash, since Hydra takes no folder whose name ends in .yaml.
    return [f"--config-path={file.parent}/", f"--config-name={file.stem}", _search_path(file)]


def _search_path(file: Path) -> str:
    """Override that tells Hydra where groups lie that are not beside a recipe's file."""
    folders = (recipes_directory(), verl_configurations())
    places = [quoted(f"file://{folder}") for folder in folders if folder != file.parent]
    return f"{SEARCH_KEY}=[{','.join(places)}]"


def study_names() -> list[str]:
    """Names of the lab's studies."""
    names = (path.stem for path in (recipes_directory() / "lab").glob("*.yaml"))
    return sorted(name for name in names if name != "base")


def require_study(name: str) -> None:
    """Refuse the name of a study that does not exist.

    Raises:
        ConfigError: with the nearest names.
    """
    if name not in study_names():
        raise ConfigError(f"unknown study {name!r}: {nearest(name, study_names())}")


def group_options(group: str, recipe: Path | None = None) -> list[str]:
    """Names that a group offers, such as the algorithms under `algo`: ours, and a recipe's own."""
    folders = {recipes_directory(), recipe.parent if recipe else recipes_directory()}
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def read_overrides(arguments: Sequence[str], recipe: Path | None = None) -> list[str]:
    """Arguments of the command line as Hydra overrides, checked; see `hydra_overrides`."""
    return hydra_overrides(arguments, {group: group_options(group, recipe) for group in GROUPS})


def run_folder(config: DictConfig) -> Path:
    """Folder of a run, as Hydra resolves `hydra.run.dir` of a composed configuration.

    Raises:
        ConfigError: it does not resolve, or to no name that configurations can hold.
    """
    # Its value may refer to what Hydra knows of the job.
    HydraConfig.instance().set_config(config)
    try:
        given = OmegaConf.select(config, RUN_FOLDER_KEY)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{RUN_FOLDER_KEY}: {first_line(error)}") from error
    folder = Path(str(given)).expanduser().absolute()
    if not given or "${" in str(folder):
        raise ConfigError(
            f"{RUN_FOLDER_KEY}={given}: must name a folder, without ${{ in its path ({folder})"
        )
    return folder


def compose_recipe(recipe: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a recipe with Hydra overrides, as `verl.trainer.main_ppo` would.

    Returns:
        The whole configuration, Hydra's own part included.

    Raises:
        ConfigError: names the recipe, group, option or key, and the nearest valid ones.
    """
    file = recipe_file(recipe)
    overrides = read_overrides(overrides, file)
    try:
        _require_base(recipe, OmegaConf.load(file))
        with initialize_config_dir(str(file.parent), version_base=None):
            try:
                config = _compose(file, overrides)
            except ConfigCompositionException as error:
                known = _unknown_setting(file, overrides)
                raise ConfigError(known or f"recipe {recipe}: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe}: {_yaml_fault(file, error)}") from error
    except RecursionError as error:
        text = "builds on itself, or is nested too deeply; give the file a name of its own"
        raise ConfigError(f"recipe {recipe}: {text}") from error
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"recipe {recipe}: {first_line(error)}") from error
    if OmegaConf.select(config, _CALLBACK) is None or "actor_rollout_ref" not in config:
        raise ConfigError(f"recipe {recipe}: {_NO_BASE}")
    return config


def _require_base(recipe: str, own: object) -> None:
    """Refuse a recipe's file that builds on no other, or names folders of groups."""
    if not isinstance(own, DictConfig) or not own.get("defaults"):
        raise ConfigError(f"recipe {recipe}: {_NO_BASE}")
    if OmegaConf.select(own, SEARCH_KEY) is not None:
        raise ConfigError(f"recipe {recipe}: {SEARCH_KEY}: {OWN_GROUPS}")


def _yaml_fault(file: Path, error: yaml.YAMLError) -> str:
    """What is wrong with a recipe's file or one of its groups, and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return first_line(error)
    problem = getattr(error, "problem", None) or "is no YAML"
    other = "" if mark.name == str(file) else f"{mark.name}, "
    return f"{other}line {mark.line + 1}, column {mark.column + 1}: {problem}"


def without_hydra(config: DictConfig) -> DictConfig:
    """The part of a composed configuration that verl reads."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _compose(file: Path, overrides: Sequence[str]) -> DictConfig:
    given = [_search_path(file), *overrides]
    return compose(file.stem, overrides=given, return_hydra_config=True)


def _unknown_setting(file: Path, overrides: Sequence[str]) -> str | None:
    """Name the override whose key does not exist, and the keys that look like it."""
    groups = [text for text in overrides if text.split("=", 1)[0].lstrip("+~") in GROUPS]
    try:
        plain = _compose(file, groups)
    except HydraException:
        return None
    keys = set(leaf_keys(plain))
    for text in overrides:
        key = overridden_key(text)
        node = OmegaConf.select(plain, key, throw_on_missing=False)
        if text.startswith("+") or text in groups:
            continue
        if isinstance(node, DictConfig):
            first = next(leaf_keys(node, f"{key}."))
            return f"{text!r}: {key} is a section; set one of its keys, such as {first}"
        if key not in keys and node is None:
            return f"unknown setting {key!r} in {text!r}: {nearest(key, keys)}"
    return None


def leaf_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of every value in a configuration."""
    for key in config:
        name = f"{prefix}{key}"
        if name == "hydra":
            continue
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_interpolation()):
            yield name
            yield from leaf_keys(node, f"{name}.")
        else:
            yield name
