"""Finds and composes recipes, and explains what does not compose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpo_verl.config.overrides import (
    RUN_FOLDER_KEY,
    first_line,
    hydra_overrides,
    nearest,
    overridden_key,
    quoted,
)
from hpo_verl.errors import ConfigError, EnvironmentCheckError

GROUPS = ("task", "model", "algo", "hardware")


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


def recipe_names() -> list[str]:
    """Names of the recipes: the YAML files at the top of the recipes' folder."""
    return sorted(path.stem for path in recipes_directory().glob("*.yaml"))


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


def group_options(group: str) -> list[str]:
    """Names that a recipe's group offers, such as the algorithms under `algo`."""
    return sorted(path.stem for path in (recipes_directory() / group).glob("*.yaml"))


def read_overrides(arguments: Sequence[str]) -> list[str]:
    """Arguments of the command line as Hydra overrides, checked; see `hydra_overrides`."""
    return hydra_overrides(arguments, {group: group_options(group) for group in GROUPS})


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
    if recipe not in recipe_names():
        raise ConfigError(f"unknown recipe {recipe!r}: {nearest(recipe, recipe_names())}")
    overrides = read_overrides(overrides)
    with initialize_config_dir(str(recipes_directory()), version_base=None):
        try:
            return _compose(recipe, overrides)
        except ConfigCompositionException as error:
            raise ConfigError(
                _unknown_setting(recipe, overrides) or f"recipe {recipe}: {first_line(error)}"
            ) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"recipe {recipe}: {first_line(error)}") from error


def without_hydra(config: DictConfig) -> DictConfig:
    """The part of a composed configuration that verl reads."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _compose(recipe: str, overrides: Sequence[str]) -> DictConfig:
    search = f"hydra.searchpath=[{quoted(f'file://{verl_configurations()}')}]"
    return compose(recipe, overrides=[search, *overrides], return_hydra_config=True)


def _unknown_setting(recipe: str, overrides: Sequence[str]) -> str | None:
    """Name the override whose key does not exist, and the keys that look like it."""
    groups = [text for text in overrides if text.split("=", 1)[0].lstrip("+~") in GROUPS]
    try:
        plain = _compose(recipe, groups)
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
