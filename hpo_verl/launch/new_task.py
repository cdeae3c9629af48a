"""`hpo-verl init`: a folder with a small task that runs at once, for the user to change."""

from __future__ import annotations

import json
import os
from pathlib import Path

from data_prep.command import check_output, staging
from hpo_verl.checks.data import NO_PATTERN, is_pattern
from hpo_verl.errors import ConfigError, DataError

TEMPLATES = Path(__file__).with_name("own_task")
NAMES = ("recipe.yaml", "reward.py", "rows.jsonl", "run.py")
_PLACE = "FOLDER"


def make_task(folder: Path) -> list[Path]:
    """Write recipe, reward, rows and script into a new or an empty folder; return their paths.

    Raises:
        ConfigError: the recipe could not hold the folder's name.
        DataError: something is in the folder, or it cannot be written.
    """
    place = str(folder.expanduser().absolute())
    if "${" in place or not place.isprintable():
        raise ConfigError(f"{place!r}: a recipe cannot name a folder with ${{ or control letters")
    target = Path(place)
    if is_pattern(target):
        raise ConfigError(f"{folder} {NO_PATTERN}")
    check_output(target)
    if target.is_dir() and any(target.iterdir()):
        raise DataError(f"{folder} is not empty; name a new or an empty folder")
    with staging(target) as temporary:
        for name in NAMES:
            text = (TEMPLATES / name).read_text(encoding="utf-8")
            # What JSON quotes, YAML reads as it was.
            text = text.replace(f": {_PLACE}\n", f": {json.dumps(place, ensure_ascii=False)}\n")
            (temporary / name).write_text(text, encoding="utf-8")
        for name in NAMES:
            os.replace(temporary / name, target / name)
    return [folder / name for name in NAMES]
