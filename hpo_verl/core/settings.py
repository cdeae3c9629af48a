"""Checks of settings; every message names the key, the value and what is permitted."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hpo_verl.errors import ConfigError

SettingsT = TypeVar("SettingsT")


def require_number(
    key: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Refuse anything but a finite real number from `low` to `high`, with `open_low` above `low`.

    Raises:
        ConfigError: Names the key, the value and the range.
    """
    end = ", inf)" if high == math.inf else f", {high:g}]"
    permitted = f"a number in {'(' if open_low else '['}{low:g}{end}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} = {value!r}: must be {permitted}, got {type(value).__name__}")
    if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
        raise ConfigError(f"{key} = {value!r}: must be {permitted}")


def require_integer(key: str, value: object, low: int) -> None:
    """Refuse anything but an integer of at least `low` with a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{key} = {value!r}: must be an integer of at least {low}")


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse anything but one of the named choices with a ConfigError."""
    if value not in choices:
        raise ConfigError(f"{key} = {value!r}: must be one of {', '.join(choices)}")


def require_names(key: str, value: object) -> tuple[str, ...]:
    """Return a list of names, of which there is one at least and none twice.

    Raises:
        ConfigError: It is something else.
    """
    names = _entries(value)
    texts = [name for name in names if isinstance(name, str) and name]
    if not texts or len(texts) < len(names) or len(set(texts)) < len(texts):
        raise ConfigError(f"{key} = {value!r}: must be a list of different names, one at least")
    return tuple(texts)


def require_numbers(key: str, value: object, count: int) -> tuple[float, ...]:
    """Return a list of so many finite numbers.

    Raises:
        ConfigError: It is something else.
    """
    numbers = _entries(value)
    if len(numbers) != count:
        raise ConfigError(f"{key} = {value!r}: must be a list of {count} numbers")
    for place, number in enumerate(numbers):
        require_number(f"{key}[{place}]", number, -math.inf)
    return tuple(map(float, numbers))


def _entries(value: object) -> tuple[Any, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    return ()


def require_flag(key: str, value: object) -> None:
    """Refuse anything but true and false with a ConfigError."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key} = {value!r}: must be true or false")


def parse_settings(
    settings_type: type[SettingsT], values: Mapping[str, Any] | None, path: str
) -> SettingsT:
    """Build a settings dataclass from a mapping.

    Args:
        settings_type: Dataclass that checks its own values.
        values: Settings by name; absent ones take their defaults, None means no setting at all.
        path: Where the mapping stands in the configuration, for messages.

    Raises:
        ConfigError: Not a mapping, an unknown key, or a bad value.
    """
    if values is None:
        return settings_type()
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} = {values!r}: must be a mapping, got {type(values).__name__}")
    known = [field.name for field in dataclasses.fields(settings_type)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else ""
            raise ConfigError(
                f"{path}.{key} = {values[key]!r}: unknown setting, "
                f"known are {', '.join(known)}{hint}"
            )
    return settings_type(**dict(values))
