"""Finds and composes recipes, and explains what does not compose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

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


def group_options(group: str) -> list[str]:
    """Names that a recipe's group offers, such as the algorithms under `algo`."""
    return sorted(path.stem for path in (recipes_directory() / group).glob("*.yaml"))


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> str:
    """Say which candidates look most like a word, or list them all."""
    candidates = sorted(candidates)
    close = difflib.get_close_matches(word, candidates, n=count, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"available: {', '.join(candidates)}"


def compose_recipe(recipe: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a recipe with Hydra overrides, as `verl.trainer.main_ppo` would.

    Returns:
        The whole configuration, Hydra's own part included.

    Raises:
        ConfigError: names the recipe, group, option or key, and the nearest valid ones.
    """
    if recipe not in recipe_names():
        raise ConfigError(f"unknown recipe {recipe!r}: {nearest(recipe, recipe_names())}")
    _check_group_options(overrides)
    with initialize_config_dir(str(recipes_directory()), version_base=None):
        try:
            return _compose(recipe, overrides)
        except ConfigCompositionException as error:
            raise ConfigError(
                _unknown_setting(recipe, overrides) or f"recipe {recipe}: {_first_line(error)}"
            ) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"recipe {recipe}: {_first_line(error)}") from error


def quoted(value: str) -> str:
    """A text as a value of a Hydra override, whatever letters it holds."""
    return QuotedString(value, Quote.single).with_quotes()


def without_hydra(config: DictConfig) -> DictConfig:
    """The part of a composed configuration that verl reads."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _compose(recipe: str, overrides: Sequence[str]) -> DictConfig:
    search = f"hydra.searchpath=[{quoted(f'file://{verl_configurations()}')}]"
    return compose(recipe, overrides=[search, *overrides], return_hydra_config=True)


def _check_group_options(overrides: Sequence[str]) -> None:
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"override {text!r}: {_first_line(error)}") from error
        group, option = override.get_key_element(), override.value()
        if group in GROUPS and isinstance(option, str) and option not in group_options(group):
            raise ConfigError(f"{text}: no such {group}; {nearest(option, group_options(group))}")


def _unknown_setting(recipe: str, overrides: Sequence[str]) -> str | None:
    """Name the override whose key does not exist, and the keys that look like it."""
    groups = [text for text in overrides if text.split("=", 1)[0].lstrip("+~") in GROUPS]
    plain = _compose(recipe, groups)
    keys = set(leaf_keys(plain))
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        key = override.get_key_element().lstrip("+~")
        known = key in keys or OmegaConf.select(plain, key, throw_on_missing=False) is not None
        if not (known or override.is_add() or text in groups):
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
