"""Broken rewards: they count as 0, and as errors; too many of them end the run.

The reward manager is selected by verl's own setting `reward.reward_manager.name=guarded`; it
scores as verl's `naive` does. An error is a reward that raises, returns no finite number (nor a
dict with one under `score`), does not return within `reward.guard.time_limit` seconds, or ends its
process. Which responses these were travels with them as `reward_error` (0 or 1) and
`reward_error_text`; the trainer hands them to `check_rewards`.

A plain function runs in a process of its own (`guarded_function`); what is to be scored at the
same time is sent there together. A coroutine function runs here, where a time limit can end it
only while it awaits something.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager import NaiveRewardManager, register

from hpo_verl.errors import ConfigError, DataError, RewardError
from hpo_verl.rewards.guarded_function import (
    VERLS_FUNCTION,
    Answer,
    GuardedFunction,
    RewardGuardSettings,
    guard_section,
)
from hpo_verl.rewards.scoring_process import checked_result, describe
from hpo_verl.runs.files import write_atomically
from hpo_verl.verl_plugin.rollout.coalescer import Coalescer

NAME = "guarded"
METRIC = "reward/error_fraction"
FILE_NAME = "reward_error.json"
RESPONSE_CHARACTERS = 2000


def is_guarded(config: Mapping[str, Any]) -> bool:
    """Whether a configuration selects this reward manager."""
    return config["reward"]["reward_manager"]["name"] == NAME


def guard_settings(config: Mapping[str, Any]) -> RewardGuardSettings:
    """Read what concerns this manager in verl's configuration; bad settings raise ConfigError."""
    reward = config["reward"]
    settings = guard_section(reward.get("guard"))
    if not is_guarded(config):
        return settings
    who, model = f"reward.reward_manager.name = {NAME!r}", reward["reward_model"]
    if model["enable"] and not model["enable_resource_pool"]:
        raise ConfigError(
            f"{who}: with reward.reward_model.enable it needs "
            "reward.reward_model.enable_resource_pool = True; else use naive"
        )
    if reward["sandbox_fusion"]["url"]:
        raise ConfigError(
            f"{who}: reward.sandbox_fusion is for the rewards that verl brings; use naive"
        )
    return settings


@register(NAME)
class GuardedRewardManager(NaiveRewardManager):
    """verl's `naive` reward manager with bounded time and no exceptions."""

    # Set by the parent, which verl's decorator hides from a type checker.
    tokenizer: Any
    compute_score: Any
    is_async_reward_score: bool
    reward_router_address: str | None
    reward_model_tokenizer: Any

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **kwargs: Any) -> None:
        super().__init__(config, tokenizer, compute_score, **kwargs)
        self.settings = guard_settings(config)
        custom = config.reward.custom_reward_function
        self._reward_kwargs = dict(custom.get("reward_kwargs") or {})
        self._blank: dict[str, Any] = {"acc": 0.0}
        self._batches: Coalescer[DataProto, dict[str, Any]] = Coalescer(self._score_batch, pause=0)
        self._function: GuardedFunction | None = None
        if not self.is_async_reward_score:
            path, name = (custom.path, custom.name) if custom.path else VERLS_FUNCTION
            self._function = GuardedFunction(path, name, self.settings)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Score the last sequence of one response, as verl's `naive` does."""
        last: Any = data[-1:]
        return await self._batches.submit(last)

    async def _score_batch(self, rows: list[DataProto]) -> list[dict[str, Any]]:
        if (function := self._function) is None:
            calls = [self._arguments(row) for row in rows]
            answers = await asyncio.gather(*(self._await_score(call) for call in calls))
        else:
            # verl decodes each response in a thread of its own, which takes 0.03 s for 512.
            answers = await asyncio.to_thread(
                lambda: function.score([self._arguments(row) for row in rows])
            )
        return self._outputs(answers)

    async def _await_score(self, arguments: dict[str, Any]) -> Answer:
        try:
            value = await asyncio.wait_for(
                self.compute_score(**arguments), self.settings.time_limit
            )
            return checked_result(value), ""
        except asyncio.TimeoutError:
            return {}, f"the reward did not return within {self.settings.time_limit:g} s"
        except Exception as error:
            return {}, describe(error)

    def _arguments(self, data: DataProto) -> dict[str, Any]:
        """Keyword arguments of verl's reward functions for one response."""
        row = data[0]
        response = row.batch["responses"]
        columns = row.non_tensor_batch
        # verl counts the last of the mask, but pads prompt and response of a session's outputs as
        # one: the response to a shorter one would be cut.
        length = columns.get("response_len")
        if length is None:
            length = row.batch["attention_mask"][-response.shape[-1] :].sum()
        arguments = {
            "data_source": columns["data_source"],
            "solution_str": self.tokenizer.decode(response[:length], skip_special_tokens=True),
            "ground_truth": columns["reward_model"]["ground_truth"],
            "extra_info": {
                **columns.get("extra_info", {}),
                **(columns.get("tool_extra_fields") or {}),
                "num_turns": columns.get("__num_turns__"),
                "rollout_reward_scores": columns.get("reward_scores", {}),
            },
        }
        if self.reward_router_address is not None:
            arguments["reward_router_address"] = self.reward_router_address
            arguments["reward_model_tokenizer"] = self.reward_model_tokenizer
        # verl's wrapper around a coroutine function adds these itself.
        return arguments if self.is_async_reward_score else {**arguments, **self._reward_kwargs}

    def _outputs(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """What verl's reward workers return; the keys are those of a reward that worked."""
        if worked := next((result for result, problem in answers if not problem), None):
            self._blank = {key: _blank(value) for key, value in worked.items()}
        outputs = []
        for result, problem in answers:
            info = self._blank | result
            info |= {"reward_error": float(bool(problem)), "reward_error_text": problem}
            score = result.get("score", result.get("acc", 0.0))
            outputs.append({"reward_score": score, "reward_extra_info": info})
        return outputs


def _blank(value: Any) -> Any:
    """What stands for a value of a reward that failed: an empty text, or as many zeros."""
    if isinstance(value, list):
        return [_blank(entry) for entry in value]
    return None if value is None else type(value)()


def check_rewards(
    batch: Any,
    config: Mapping[str, Any],
    tokenizer: Any,
    step: int,
    folder: Path,
    metrics: dict[str, Any],
) -> None:
    """Log the share of rewards that failed, and end a run with too many.

    The batch has no padding rows. The first response whose reward failed is written to the folder,
    the run's.

    Raises:
        RewardError: the share is above `reward.guard.max_error_fraction`; names the file.
        DataError: a response was not scored by the reward manager here.
    """
    import transfer_queue as tq

    def column(name: str, keys: list[str]) -> Any:
        where: dict[str, Any] = {"keys": keys, "partition_id": batch.partition_id}
        return tq.kv_batch_get(**where, select_fields=[name]).pop(name)

    failed = []
    for key, fields in zip(batch.keys, column("extra_fields", batch.keys).tolist(), strict=True):
        info = (fields if isinstance(fields, dict) else {}).get("reward_extra_info") or {}
        if "reward_error" not in info:
            raise DataError("a response carries no reward_error: reward manager 'guarded' expected")
        if info["reward_error"]:
            failed.append((key, str(info["reward_error_text"])))
    fraction = metrics[METRIC] = len(failed) / max(len(batch.keys), 1)
    limit = guard_settings(config).max_error_fraction
    if fraction <= limit:
        return
    key, error = failed[0]
    response = tokenizer.decode(column("responses", [key])[0], skip_special_tokens=True)
    offender = {
        "error": error,
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
