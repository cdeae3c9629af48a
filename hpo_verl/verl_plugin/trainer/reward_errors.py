"""The share of a step's responses whose reward failed, and the end of a run with too many."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpo_verl.errors import DataError, RewardError
from hpo_verl.runs.files import write_atomically
from hpo_verl.verl_plugin.rollout.reward_guard import guard_settings, is_guarded

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


def write_offender(folder: Path, offender: dict[str, Any]) -> Path:
    """Write what a reward failed on; anything but printable ASCII is escaped.

    Args:
        folder: the run's folder.
        offender: with the response under `response`, which is cut at 2,000 characters.

    Returns:
        The file.
    """
    response = str(offender["response"])
    shown = {
        **offender,
        "response": response[:RESPONSE_CHARACTERS],
        "response_characters": len(response),
    }
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    # DEL is the one control character that JSON leaves as it is.
    write_atomically(path, json.dumps(shown, indent=2).replace("\x7f", "\\u007f") + "\n")
    return path


def run_folder(default_local_dir: str) -> Path:
    """Folder of verl's metrics file, which `train` and `preflight` set; else the checkpoints'."""
    metrics = os.environ.get("VERL_FILE_LOGGER_PATH")
    return Path(metrics).parent if metrics else Path(default_local_dir)


class RewardErrors:
    """Mixed into a trainer of verl: logs `reward/error_fraction`, and stops above a threshold.

    Does nothing unless the reward manager `guarded` is selected.
    """

    config: Any
    tokenizer: Any
    global_steps: int

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if is_guarded(self.config):
            self._count_reward_errors(batch, metrics)
        return super()._compute_advantage(batch, metrics)  # type: ignore[misc]

    def _count_reward_errors(self, batch: Any, metrics: dict[str, Any]) -> None:
        import transfer_queue as tq

        keys = [
            key
            for key, tag in zip(batch.keys, batch.tags, strict=True)
            if not tag.get("is_padding", False)
        ]
        data = tq.kv_batch_get(
            keys=keys, partition_id=batch.partition_id, select_fields=["extra_fields"]
        )
        texts = reward_errors(data.pop("extra_fields").tolist())
        failed = [row for row, text in enumerate(texts) if text]
        fraction = len(failed) / max(len(texts), 1)
        metrics[METRIC] = fraction
        limit = guard_settings(self.config).max_error_fraction
        if fraction <= limit:
            return
        first = failed[0]
        response = tq.kv_batch_get(
            keys=[keys[first]], partition_id=batch.partition_id, select_fields=["responses"]
        )["responses"][0]
        path = write_offender(
            run_folder(self.config.trainer.default_local_dir),
            {
                "error": texts[first],
                "step": self.global_steps,
                "sample": keys[first],
                "response": self.tokenizer.decode(response, skip_special_tokens=True),
            },
        )
        raise RewardError(
            f"{METRIC} = {fraction:.3g} in step {self.global_steps}, above "
            f"reward.guard.max_error_fraction = {limit:g}; the first response and its error: {path}"
        )
