"""Arguments of the command line as Hydra overrides."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from hpo_verl.errors import ConfigError

RUN_FOLDER_KEY, SEARCH_KEY = "hydra.run.dir", "hydra.searchpath"
OWN_GROUPS = "groups of your own lie beside your recipe's file, which is given as ./NAME.yaml"
_HYDRA_FOLDERS = ("cd", "cp", "cn", "config-dir", "config-path", "config-name")
ONE_RUN = "one command is one run; start one command for each value"
NO_SWEEP = f"hydra.mode=MULTIRUN: must be RUN; {ONE_RUN}"
# What Hydra takes for a key, a group or a package.
_KEY = re.compile(r"[~+]*[\w$][\w$./@:-]*")
_LIKE_A_PATH = ("/", "./", "../", "~/")


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or the name of its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Say which candidates look most like a word, dotted ones by their last parts; else list all.

    Of more than a screenful none is listed.
    """
    names, word = sorted(candidates), word.lower()
    close = [name for name in names if name.endswith(f".{word}")]
    close = close or difflib.get_close_matches(word, names, cutoff=0.5)
    # Few letters look like anything, but as a part of a name they were meant.
    within = (n for n in names if word and word in n.rpartition(".")[2])
    close = close or sorted(within, key=len)
    if close:
        return f"did you mean {' or '.join(close[:3])}?"
    return f"available: {', '.join(names)}" if len(names) <= 50 else "nothing looks like it"


def quoted(value: str) -> str:
    """A text as a value of a Hydra override, whatever letters it holds."""
    literal = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
    return QuotedString(literal, Quote.single).with_quotes()


def setting(key: str, text: str) -> str:
    """KEY=VALUE that Hydra reads as this text; quoted only where its grammar needs it."""
    plain = f"{key}={text}"
    try:
        override = OverridesParser.create().parse_override(plain)
    except HydraException:
        return f"{key}={quoted(text)}"
    read_as_it_is = override.value() == text and not override.is_sweep_override()
    return plain if read_as_it_is and "${" not in text else f"{key}={quoted(text)}"


def overridden_key(text: str) -> str:
    """Dotted key of an override."""
    return text.partition("=")[0].strip().lstrip("+~")


def names_run_folder(overrides: Sequence[str]) -> bool:
    """Whether an override says where the run's folder is: its key, or a section around it."""
    return any(RUN_FOLDER_KEY.startswith(overridden_key(text)) for text in overrides)


def without_run_folder(overrides: Sequence[str]) -> list[str]:
    """All overrides but those of `hydra.run.dir`."""
    return [text for text in overrides if overridden_key(text) != RUN_FOLDER_KEY]


def hydra_overrides(arguments: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Check arguments KEY=VALUE, and quote each path that Hydra's grammar would not read as text.

    Args:
        arguments: as the shell passed them.
        groups: the options of each group of recipes.

    Raises:
        ConfigError: names the argument and says what to write.
    """
    for position, text in enumerate(arguments):
        if text.startswith("-"):
            raise ConfigError(_dashes(text, *arguments[position + 1 : position + 2]))
    return [_hydra_override(text, groups) for text in arguments]


def _dashes(text: str, following: str = "VALUE") -> str:
    name, _, value = text.lstrip("-").partition("=")
    if name in ("m", "multirun"):
        return f"{text}: {ONE_RUN}"
    if name in _HYDRA_FOLDERS:
        return f"{text}: {OWN_GROUPS}"
    return f"{text}: a setting is written KEY=VALUE, as in {name}={value or following}"


def _for_the_shell(text: str) -> str:
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def _hydra_override(text: str, groups: Mapping[str, Sequence[str]]) -> str:
    name, equals, value = text.partition("=")
    key = overridden_key(text)
    if not (_KEY.fullmatch(name) and (equals or name[0] == "~")):
        fitting = [f"{group}={text}" for group, options in groups.items() if text in options]
        raise ConfigError(f"{text!r}: write {' or '.join(fitting) or 'KEY=VALUE, without blanks'}")
    if key in groups and name[0] == "+":
        raise ConfigError(f"{text}: the recipe has {key} already; write {key}={value}")
    if key == SEARCH_KEY:
        raise ConfigError(f"{text}: {OWN_GROUPS}")
    if key == RUN_FOLDER_KEY and not value:
        raise ConfigError(f"{text}: must name a folder")
    is_path = key == RUN_FOLDER_KEY or value.startswith(_LIKE_A_PATH)
    override: Override | None = None
    try:
        override = OverridesParser.create().parse_override(text)
        problem = ONE_RUN
    except HydraException as error:
        problem = first_line(error)
    if override is None or override.is_sweep_override():
        as_text = f"{name}={quoted(value)}"
        if is_path:
            return as_text
        if key in groups and override is None:
            problem = f"no such {key}; {nearest(value, groups[key])}"
        remedy = "" if key in groups else f"; to give it as a text: {_for_the_shell(as_text)}"
        raise ConfigError(f"override {text!r}: {problem}{remedy}")
    if key in groups and not override.is_delete() and override.value() not in groups[key]:
        raise ConfigError(f"{text}: no such {key}; {nearest(str(override.value()), groups[key])}")
    return text
