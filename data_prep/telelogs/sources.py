"""Where real TeleLogs rows come from, and where they may not go.

The dataset `netop/TeleLogs` (arXiv 2507.21974) is gated and its authors ask that it is not shared
again: its rows are read with the user's own token or from the user's own file, and are never
written into a repository.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.command import first_line
from data_prep.examples import Example, check_examples, read_examples
from hpo_verl.errors import DataError
from hpo_verl.rewards.telelogs import CAUSES

HUB_DATASET = "netop/TeleLogs"
HUB_SPLITS = {"train": "train", "val": "test"}
HOW_TO_ASK = (
    f"ask for access on https://huggingface.co/datasets/{HUB_DATASET} (log in, accept the "
    "conditions, wait for the authors' approval), make a token with read permission on "
    f"https://huggingface.co/settings/tokens and set it as HF_TOKEN; "
    "--source synthetic needs no access"
)
_COLUMNS = ("question", "answer")


def read_file(path: str | Path) -> list[Example]:
    """Read the columns question and answer of a parquet, jsonl or csv file; see `read_examples`."""
    return read_examples(path, *_COLUMNS, CAUSES)


def read_hub(revision: str | None) -> tuple[dict[str, list[Example]], str]:
    """Read both splits of the hub's dataset at one commit, with the user's token.

    Args:
        revision: Commit to read, 40 hexadecimal digits; None takes the newest of `main`.

    Returns:
        Split ("train", "val") -> rows, and the commit.

    Raises:
        DataError: No token or access, no such commit, no network, or a bad row.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise DataError(f"HF_TOKEN is not set and {HUB_DATASET} is a gated dataset: {HOW_TO_ASK}")
    try:
        commit = revision or _newest_commit(token)
        rows = {split: _hub_rows(name, token, commit) for split, name in HUB_SPLITS.items()}
    # The hub's client raises errors of five libraries; each of them means the same here.
    except Exception as error:
        raise DataError(
            f"{HUB_DATASET}: cannot be read ({type(error).__name__}: {first_line(error)}); "
            f"if access is what is missing, {HOW_TO_ASK}"
        ) from error
    name = f"{HUB_DATASET}@{commit[:8]}"
    checked = {
        split: check_examples(read, f"{name} {HUB_SPLITS[split]}", *_COLUMNS, CAUSES)
        for split, read in rows.items()
    }
    return checked, commit


def _newest_commit(token: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(HUB_DATASET, revision="main", token=token).sha)


def _hub_rows(split: str, token: str, commit: str) -> Iterable[Any]:
    """The only function that reads rows over the network."""
    from datasets import load_dataset

    def load(name: str | None) -> Iterable[Any]:
        return load_dataset(HUB_DATASET, name, split=split, revision=commit, token=token)

    try:
        # The dataset was published under this configuration name and also without one.
        return load("troubleshooting")
    except ValueError as error:
        # What `datasets` raises for a configuration that does not exist.
        if "BuilderConfig" not in str(error):
            raise
        return load(None)


def check_outside_repositories(out: str | Path) -> None:
    """Raise DataError if `out`, the folder for real rows, lies in a repository."""
    folder = Path(out).resolve()
    for parent in (folder, *folder.parents):
        if (parent / ".git").exists():
            raise DataError(
                f"--out: {folder} lies in the repository {parent}; TeleLogs rows must not be "
                "shared again, so choose a folder outside any repository"
            )
