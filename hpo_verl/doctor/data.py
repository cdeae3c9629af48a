"""Whether the data are there, in verl's schema, scored by the reward, and short enough."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from hpo_verl.doctor.finding import Finding, attempt, error, first_line, ok, skipped, warning
from hpo_verl.doctor.subject import Subject
from hpo_verl.errors import DataError
from hpo_verl.launch import checks
from hpo_verl.launch.quiet import quiet_imports

SAMPLE_ROWS = 100
BATCH_ROWS = 2_000
COLUMNS = ("data_source", "prompt", "reward_model", "extra_info")
ROLES = ("system", "user", "assistant", "tool")
WRONG_RESPONSE = "I do not know."


class Sample(NamedTuple):
    """Rows of a file.

    Attributes:
        rows: number of all of them.
        spread: position -> row, evenly over the file.
        longest: position -> row, those with the most letters in their prompt.
    """

    rows: int
    spread: dict[int, Mapping[str, Any]]
    longest: dict[int, Mapping[str, Any]]


def check_data(subject: Subject, tokenizer_folder: str | None) -> list[Finding]:
    """All checks of the data files.

    Args:
        subject: what is examined.
        tokenizer_folder: where the recipe's tokenizer can be read; None if nowhere.
    """

    def files() -> str:
        checks.check_data(subject.config)
        found = [f"{path} ({_count(path)} rows)" for _, path in checks.data_files(subject.config)]
        return ", ".join(found)

    present = attempt("data files", files, subject.command("prepare"))
    if present.status == "error":
        reason = "the data files are not all there"
        return [present, *(skipped(name, reason) for name in ("schema", "reward", "prompts"))]
    samples: dict[Path, Sample] = {}

    def schema() -> str:
        for key, path in checks.data_files(subject.config):
            samples[path] = read_sample(key, path)
        rows = sum(sample.rows for sample in samples.values())
        return f"{rows} rows: chat messages, a data source and a ground truth in each"

    findings = [
        present,
        attempt("schema", schema, f"remove the file; {subject.command('prepare')}"),
    ]
    if findings[-1].status == "error":
        reason = "the rows are not in verl's schema"
        return [*findings, *(skipped(name, reason) for name in ("reward", "prompts"))]
    return [
        *findings,
        check_reward(subject, samples),
        check_prompts(subject, samples, tokenizer_folder),
    ]


def _count(path: Path) -> int:
    return pq.ParquetFile(path).metadata.num_rows


def read_sample(key: str, path: Path) -> Sample:
    """Check every row of a file, and keep some.

    Raises:
        DataError: names key, file, row (1 is the first) and column.
    """
    file = pq.ParquetFile(path)
    rows = file.metadata.num_rows
    wanted = {i * rows // SAMPLE_ROWS for i in range(SAMPLE_ROWS)} if rows else set()
    columns = [name for name in COLUMNS if name in file.schema_arrow.names]
    spread: dict[int, Mapping[str, Any]] = {}
    longest: list[tuple[int, int, Mapping[str, Any]]] = []
    position = 0
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                letters = _letters(row, f"{key}: {path}: row {position + 1}")
                if position in wanted:
                    spread[position] = row
                # The position keeps rows, which have no order, out of the comparison.
                heapq.heappush(longest, (letters, -position, row))
                if len(longest) > SAMPLE_ROWS:
                    heapq.heappop(longest)
                position += 1
    except (OSError, ValueError) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(
            f"{key}: {path}: cannot read on after row {position}: {first_line(problem)}"
        ) from problem
    return Sample(rows, spread, {-negative: row for _, negative, row in longest})


def _letters(row: Mapping[str, Any], place: str) -> int:
    """Letters of a row's prompt.

    Raises:
        DataError: the row is not in verl's schema.
    """
    if not isinstance(row["data_source"], str) or not row["data_source"]:
        raise DataError(f"{place}, column 'data_source': {row['data_source']!r} is not a name")
    truth = row["reward_model"]
    if not isinstance(truth, dict) or truth.get("ground_truth") is None:
        raise DataError(f"{place}, column 'reward_model': has no ground_truth")
    prompt = row["prompt"]
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{place}, column 'prompt': is not a list of chat messages")
    letters = 0
    for message in prompt:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(
                f"{place}, column 'prompt': a message needs a role, one of {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise DataError(f"{place}, column 'prompt': a message needs a text as its content")
        letters += len(message["content"])
    return letters


def check_reward(subject: Subject, samples: Mapping[Path, Sample]) -> Finding:
    """Score rows with the run's own reward function: a wrong response and, if known, a right one.

    Args:
        subject: what is examined.
        samples: rows of each file.
    """
    path = subject.get("reward.custom_reward_function.path", "verl's default_compute_score")
    fix = f"correct {path}, or reward.custom_reward_function.path and .name"
    try:
        with quiet_imports():
            from hpo_verl.verl_plugin.preview import reward_function

            score = reward_function(subject.config)
    except Exception as problem:
        return error("reward", f"{path} cannot be loaded: {first_line(problem)}", fix)
    chosen = [row for sample in samples.values() for row in sample.spread.values()]
    chosen = chosen[:: max(1, len(chosen) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    keys: set[frozenset[str]] = set()
    wrong, right, known = [], [], 0
    for number, row in enumerate(chosen, start=1):
        try:
            base = _value(score(row, WRONG_RESPONSE), keys)
            best = [_value(score(row, text), keys) for text in right_responses(row)]
        except Exception as problem:
            return error("reward", f"{path}, sampled row {number}: {first_line(problem)}", fix)
        wrong.append(base)
        known += bool(best)
        right += [max(best)] if best and max(best) > base else []
    if len(keys) > 1:
        return error("reward", f"{path}: the keys it returns differ from row to row", fix)
    low = (
        f"{len(chosen)} rows scored by {path}: {min(wrong):g} to {max(wrong):g} "
        "for a wrong response"
    )
    if not known:
        return ok("reward", f"{low}; no right response is known to compare with")
    if len(right) < known:
        return warning(
            "reward",
            f"{low}; in {known - len(right)} of {known} rows the known answer scores no better",
            "check that the reward function and the data belong together",
        )
    return ok("reward", f"{low}, up to {max(right):g} for the known answer in all {known}")


def right_responses(row: Mapping[str, Any]) -> Iterator[str]:
    """Responses that hold a row's answer, where the row says it as text."""
    truth = row["reward_model"]["ground_truth"]
    for answer in ((row.get("extra_info") or {}).get("solution"), truth):
        if isinstance(answer, str) and answer:
            yield from (answer, f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}")


def _value(result: Any, keys: set[frozenset[str]]) -> float:
    """The score that a reward function returned; notes the keys beside it.

    Raises:
        DataError: it is not a finite number.
    """
    score = result.get("score") if isinstance(result, dict) else result
    keys.add(frozenset(result) if isinstance(result, dict) else frozenset())
    if isinstance(score, bool | int | float) and math.isfinite(score):
        return float(score)
    raise DataError(f"the score {score!r} is not a finite number")


def check_prompts(
    subject: Subject, samples: Mapping[Path, Sample], tokenizer_folder: str | None
) -> Finding:
    """Count the tokens of prompts: verl refuses one that is longer than the limit.

    Args:
        subject: what is examined.
        samples: rows of each file.
        tokenizer_folder: where the recipe's tokenizer can be read; None if nowhere.
    """
    if tokenizer_folder is None:
        return skipped("prompts", "the recipe's tokenizer cannot be read here")
    limit = subject.get("data.max_prompt_length")
    try:
        with quiet_imports():
            from hpo_verl.verl_plugin.preview import prompt_counter

            count = prompt_counter(subject.config, tokenizer_folder)
        longest, place = _longest(samples, count)
    except Exception as problem:
        return error(
            "prompts",
            f"the tokenizer of {tokenizer_folder} cannot encode them: {first_line(problem)}",
            "a tokenizer with a chat template, or actor_rollout_ref.model.custom_chat_template",
        )
    checked = sum(len({**s.spread, **s.longest}) for s in samples.values())
    text = f"{longest} tokens in {place}, of {checked} prompts (the longest by letters among them)"
    if longest > limit and subject.get("data.filter_overlong_prompts", False):
        return warning(
            "prompts",
            f"data.max_prompt_length={limit}: {text}; verl leaves longer ones out",
            f"data.max_prompt_length={longest} or more",
        )
    if longest > limit:
        return error(
            "prompts",
            f"data.max_prompt_length={limit}: {text}",
            f"data.max_prompt_length={longest} or more, or data.filter_overlong_prompts=true",
        )
    return ok("prompts", f"{text}; {limit} are permitted")


def _longest(samples: Mapping[Path, Sample], count: Callable[[Any], int]) -> tuple[int, str]:
    """Tokens of the longest prompt, and where it is."""
    lengths = [
        (count(row["prompt"]), f"{path.name} row {position + 1}")
        for path, sample in samples.items()
        for position, row in {**sample.spread, **sample.longest}.items()
    ]
    return max(lengths)
