"""The share of a step's responses whose reward failed, and the end of a run with too many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transfer_queue as tq

from hpo_verl.errors import DataError, RewardError
from hpo_verl.runs.files import write_atomically
from hpo_verl.verl_plugin.rollout.reward_guard import guard_settings

METRIC = "reward/error_fraction"
FILE_NAME = "reward_error.json"
RESPONSE_CHARACTERS = 2000


def reward_errors(extra_fields: Sequence[Any]) -> list[str]:
    """What was wrong with the reward of each response; "" where nothing was.

    Args:
        extra_fields: TransferQueue's column of that name.

    Raises:
        DataError: a response was not scored by the reward manager `guarded`.
    """
    texts = []
    for fields in extra_fields:
        info = (fields if isinstance(fields, dict) else {}).get("reward_extra_info") or {}
        if "reward_error" not in info:
            raise DataError("a response carries no reward_error: reward manager 'guarded' expected")
        texts.append(str(info["reward_error_text"]) if info["reward_error"] else "")
    return texts


def check_rewards(
    batch: Any,
    config: Mapping[str, Any],
    tokenizer: Any,
    step: int,
    folder: Path,
    metrics: dict[str, Any],
) -> None:
    """Log the share of rewards that failed, and end a run with too many.

    Args:
        batch: verl's batch of the step, without padding rows.
        config: verl's whole configuration.
        tokenizer: decodes the response of the error.
        step: for the message.
        folder: the run's, where the first response whose reward failed is written.
        metrics: of the step; gets `reward/error_fraction`.

    Raises:
        RewardError: the share is above `reward.guard.max_error_fraction`; names the file.
    """

    def column(name: str, keys: list[str]) -> Any:
        where: dict[str, Any] = {"keys": keys, "partition_id": batch.partition_id}
        return tq.kv_batch_get(**where, select_fields=[name]).pop(name)

    texts = reward_errors(column("extra_fields", batch.keys).tolist())
    failed = [row for row, text in enumerate(texts) if text]
    fraction = metrics[METRIC] = len(failed) / max(len(texts), 1)
    limit = guard_settings(config).max_error_fraction
    if fraction <= limit:
        return
    key = batch.keys[failed[0]]
    response = tokenizer.decode(column("responses", [key])[0], skip_special_tokens=True)
    offender = {
        "error": texts[failed[0]],
        "step": step,
        "sample": key,
        "response": response[:RESPONSE_CHARACTERS],
        "response_characters": len(response),
    }
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    # JSON escapes all but printable ASCII, and DEL.
    write_atomically(path, json.dumps(offender, indent=2).replace("\x7f", "\\u007f") + "\n")
    raise RewardError(
        f"{METRIC} = {fraction:.3g} in step {step}, above reward.guard.max_error_fraction = "
        f"{limit:g}; the first response and its error: {path}"
    )
