"""Takes secrets out of settings, command lines and texts: by the name of a key, and by form."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpo_verl.config.settings import leaves

MASK = "***"
# Words of a key, in snake_case or upper case, whose value is secret.
SECRET_WORDS = {"token", "secret", "password", "passwd", "pass", "credential", "credentials"}
SECRET_ENDINGS = {("api", "key"), ("access", "key"), ("private", "key"), ("auth", "key")}
# Keys of well-known services, by their prefix, and passwords inside URLs.
SECRET_TEXT = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abprs]-|AKIA)[A-Za-z0-9_-]{8,}"
    r"|(?<=://)[^/@\s:]{1,100}:[^/@\s]{1,200}(?=@)"
)
# A shorter value may be a word that any program prints.
SHORTEST = 8


def is_secret(key: str) -> bool:
    """Whether a key's last part names something secret, such as `HF_TOKEN` or `api_key`."""
    words = key.rsplit(".", 1)[-1].lower().replace("-", "_").split("_")
    return bool(SECRET_WORDS & set(words)) or tuple(words[-2:]) in SECRET_ENDINGS


def masked(value: Any, key: str = "") -> Any:
    """Plain containers with secret texts replaced by `***`; everything else as it is."""
    if isinstance(value, dict):
        return {name: masked(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [masked(entry, key) for entry in value]
    if isinstance(value, str) and value:
        return MASK if is_secret(key) else SECRET_TEXT.sub(MASK, value)
    return value


def masked_command(command: Sequence[str]) -> list[str]:
    """A command line whose `key=value` arguments are masked where the key is secret."""
    parts = [text.partition("=") for text in command]
    return [key + sign + masked(value, key) if sign else masked(key) for key, sign, value in parts]


def secret_mask(*sources: Mapping[str, Any]) -> Callable[[str], str]:
    """Make a function that puts `***` for secrets in a text.

    Masked are the values of secret keys in the sources, environment variables and settings, and
    whatever has the form of a secret.
    """
    secrets = {
        value
        for source in sources
        for key, value in leaves(dict(source))
        if isinstance(value, str) and len(value) >= SHORTEST and is_secret(key)
    }
    # The longest first: one may be part of another.
    known = re.compile("|".join(map(re.escape, sorted(secrets, key=len, reverse=True))) or "(?!)")
    return lambda text: SECRET_TEXT.sub(MASK, known.sub(MASK, text))
