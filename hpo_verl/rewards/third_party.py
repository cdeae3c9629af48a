"""Scorers of other packages: which version of each is known, and its import where it scores.

Exact versions, since what a scorer does with hostile text was read in these.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hpo_verl.errors import EnvironmentCheckError

# Module -> what pip installs; the extra `tasks` has the same.
REQUIREMENTS = {"reasoning_gym": "reasoning-gym==0.1.25", "math_verify": "math-verify==0.9.0"}


def load(module: str) -> Any:
    """Import a module of another package; an EnvironmentCheckError where it is another version."""
    package, _, needed = REQUIREMENTS[module].partition("==")
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "not installed"
    if found != needed:
        raise EnvironmentCheckError(f"{package}: {found}; pip install {REQUIREMENTS[module]}")
    with warnings.catch_warnings():
        # Of code that others wrote, and Python compiles for the first time.
        warnings.simplefilter("ignore", SyntaxWarning)
        return importlib.import_module(module)
