"""Files of studies, `recipes/lab/*.yaml`: composed with overrides, and the regimes they cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpo_verl.config.overrides import first_line, nearest
from hpo_verl.config.recipes import leaf_keys, recipes_directory, require_study
from hpo_verl.errors import ConfigError

CROSSED = ("task", "warm_start", "lacking", "wrong_length", "max_response_length")
"""Keys of which a study takes one value or a list, besides all of `training`."""
TUNED = "training.learning_rate"
"""The key that a study with `tuning_seeds` chooses for every variant, out of its list."""
Regime = dict[str, Any]
"""Values of the crossed keys by dotted key, those of `training` too."""


def read_study_file(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose a study with Hydra's overrides.

    Raises:
        ConfigError: An unknown name or key (with the nearest one), or one that is missing.
    """
    require_study(name)
    with initialize_config_dir(str(recipes_directory() / "lab"), version_base=None):
        try:
            known = set(leaf_keys(compose(name)))
            for text in overrides:
                override = OverridesParser.create().parse_override(text)
                key = override.get_key_element()
                if not override.is_add() and not override.is_delete() and key not in known:
                    raise ConfigError(f"unknown setting {key!r} in {text!r}: {nearest(key, known)}")
            config = compose(name, overrides=list(overrides))
            values: Any = OmegaConf.to_container(config, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"study {name}: {first_line(error)}") from error
    missing = [key for key in known - set(leaf_keys(config)) if not key.startswith("variants.")]
    if missing:
        raise ConfigError(f"study {name}: the setting {min(missing)} is missing")
    return values


def regimes(study: Mapping[str, Any]) -> list[Regime]:
    """Every combination of the values that a study crosses; the first key varies slowest.

    Raises:
        ConfigError: A key has an empty list.
    """
    flat = {key: study[key] for key in CROSSED}
    flat |= {f"training.{key}": value for key, value in study["training"].items()}
    for key, value in flat.items():
        if value == []:
            raise ConfigError(f"{key} = []: must hold one value at least")
    lists = [value if isinstance(value, list) else [value] for value in flat.values()]
    return [dict(zip(flat, values, strict=True)) for values in product(*lists)]


def regime_of(cell: Mapping[str, Any]) -> Regime:
    """The regime of a run, from the fields of its cell."""
    return regimes(cell)[0]
