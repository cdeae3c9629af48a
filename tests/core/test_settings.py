import math
import re
from dataclasses import dataclass

import pytest

from hpo_verl.core.settings import (
    parse_settings,
    require_choice,
    require_flag,
    require_names,
    require_number,
    require_numbers,
)
from hpo_verl.errors import ConfigError


@dataclass(frozen=True)
class Example:
    alpha: float = 0.5
    mode: str = "a"

    def __post_init__(self):
        require_number("p.alpha", self.alpha, 0.0, 1.0)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, 0.25])
def test_numbers_of_a_closed_range_pass(value):
    require_number("k", value, 0.0, 1.0)


@pytest.mark.parametrize("value", [-0.001, 1.001, math.inf, -math.inf, math.nan])
def test_numbers_outside_name_key_value_and_range(value):
    message = re.escape(f"k = {value!r}: must be a number in [0, 1]")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        require_number("k", value, 0.0, 1.0)


@pytest.mark.parametrize("value", ["0.5", None, True, False, [0.5]])
def test_other_types_are_refused_by_name(value):
    message = re.escape(f"k = {value!r}: must be a number in [0, 1], got {type(value).__name__}")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        require_number("k", value, 0.0, 1.0)


def test_an_open_lower_end_excludes_itself_only():
    require_number("k", 1e-9, 0.0, open_low=True)
    with pytest.raises(ConfigError, match=r"^k = 0\.0: must be a number in \(0, inf\)$"):
        require_number("k", 0.0, 0.0, open_low=True)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_unbounded_range_still_refuses_what_is_not_finite(value):
    require_number("k", 1e30, 0.0)
    with pytest.raises(ConfigError, match=r"must be a number in \[0, inf\)$"):
        require_number("k", value, 0.0)


def test_choices():
    require_choice("k", "b", ("a", "b"))
    with pytest.raises(ConfigError, match=r"^k = 'c': must be one of a, b$"):
        require_choice("k", "c", ("a", "b"))


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_flags_are_true_or_false(value):
    require_flag("k", True)
    require_flag("k", False)
    with pytest.raises(ConfigError, match=f"^k = {value!r}: must be true or false$"):
        require_flag("k", value)


def test_absent_settings_are_the_defaults():
    assert parse_settings(Example, None, "p") == Example()
    assert parse_settings(Example, {}, "p") == Example()
    assert parse_settings(Example, {"alpha": 1}, "p") == Example(alpha=1)


def test_a_misspelled_key_is_refused_with_the_nearest():
    message = re.escape(
        "p.alhpa = 0.1: unknown setting, known are alpha, mode; did you mean p.alpha?"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse_settings(Example, {"alhpa": 0.1}, "p")


def test_an_unknown_key_is_refused_without_a_guess():
    message = re.escape("p.zzz = 1: unknown setting, known are alpha, mode")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse_settings(Example, {"zzz": 1}, "p")


def test_something_else_than_a_mapping_is_refused():
    with pytest.raises(ConfigError, match=r"^p = 0\.6: must be a mapping, got float$"):
        parse_settings(Example, 0.6, "p")


def test_bad_values_are_refused_by_the_dataclass():
    with pytest.raises(ConfigError, match=r"p\.alpha"):
        parse_settings(Example, {"alpha": 2}, "p")


def test_lists_of_names_and_of_numbers_become_tuples():
    assert require_names("k", ["b", "a"]) == ("b", "a")
    assert require_numbers("k", [1, -0.5], 2) == (1.0, -0.5)


@pytest.mark.parametrize("value", [[], "ab", None, {"a": 1}, ["a", "a"], ["a", ""], ["a", 1]])
def test_anything_but_different_names_is_refused(value):
    message = f"k = {value!r}: must be a list of different names, one at least"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        require_names("k", value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "k = [1.0]: must be a list of 2 numbers"),
        ("12", "k = '12': must be a list of 2 numbers"),
        (3, "k = 3: must be a list of 2 numbers"),
        ([1.0, True], "k[1] = True: must be a number in [-inf, inf)"),
        ([math.inf, 0.0], "k[0] = inf: must be a number in [-inf, inf)"),
    ],
)
def test_anything_but_so_many_numbers_is_refused(value, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        require_numbers("k", value, 2)
