"""Takes secrets out of a text: those of known names, and those of a known form."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hpo_verl.config.settings import leaves
from hpo_verl.launch.manifest import MASK, SECRET_TEXT, is_secret

# A shorter text may be a word that anything prints.
SHORTEST = 8


def secret_mask(*sources: Mapping[str, Any]) -> Callable[[str], str]:
    """Make a function that puts `***` for secrets.

    Args:
        sources: Environment variables, and plain containers of settings; their values count as
            secret where their names say so, as in `manifest.is_secret`.

    Returns:
        A function of a text. Keys of well-known services and passwords in URLs are masked too.
    """
    secrets = {
        value
        for source in sources
        for key, value in leaves(dict(source))
        if isinstance(value, str) and len(value) >= SHORTEST and is_secret(key)
    }
    # The longest first: one may be part of another.
    known = re.compile("|".join(map(re.escape, sorted(secrets, key=len, reverse=True))) or "(?!)")

    def mask(text: str) -> str:
        return SECRET_TEXT.sub(MASK, known.sub(MASK, text))

    return mask
