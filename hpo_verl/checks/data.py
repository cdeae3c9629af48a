"""Whether the data are there, in verl's schema, scored by the reward, and short enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from hpo_verl.checks.finding import Finding, attempt, error, first_line, ok, skipped, warning
from hpo_verl.checks.rows import REQUIRED_COLUMNS, SAMPLE_ROWS
from hpo_verl.checks.subject import Subject
from hpo_verl.errors import DataError, HpoVerlError
from hpo_verl.rewards.guarded_function import (
    VERLS_FUNCTION,
    Answer,
    GuardedFunction,
    guard_section,
)
from hpo_verl.runs.quiet import quiet_imports

WRONG_RESPONSE = "I do not know."
# Rewards that are slow are tried on fewer rows: no further row is begun after this time.
SCORING_SECONDS = 5.0
# What verl's reward managers add to a row's `extra_info`.
MANAGER_INFO = {"num_turns": 2, "rollout_reward_scores": {}}


def check_files(subject: Subject) -> Finding:
    """Whether every data file is a parquet file with verl's columns and enough rows."""
    found, trained = [], 0
    for key, path in subject.data_files:
        try:
            rows = _rows(key, path)
        except DataError as problem:
            return error("data files", str(problem), _how_to_mend(subject, key, path))
        trained += rows if key == "data.train_files" else 0
        found.append(f"{path} ({rows} rows)")
    batch = subject.get("data.train_batch_size")
    if trained < batch:
        return error(
            "data files",
            f"data.train_files: {', '.join(found)}: {trained} rows to train on are fewer than "
            f"data.train_batch_size={batch}, which gives 0 steps",
            "a smaller data.train_batch_size, or more data",
        )
    return ok("data files", ", ".join(found))


def _rows(key: str, path: Path) -> int:
    """Number of rows of a file.

    Raises:
        DataError: it does not exist, is no parquet file, is empty or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"{key}: {path} does not exist")
    try:
        table = pq.ParquetFile(path)
    except Exception as problem:
        raise DataError(
            f"{key}: {path} is not a complete parquet file ({first_line(problem)})"
        ) from problem
    absent = [name for name in REQUIRED_COLUMNS if name not in table.schema_arrow.names]
    if absent:
        raise DataError(f"{key}: {path} has no column {absent[0]!r}")
    if table.metadata.num_rows < 1:
        raise DataError(f"{key}: {path} has no rows")
    return table.metadata.num_rows


def _how_to_mend(subject: Subject, key: str, path: Path) -> str:
    """How to get a right file in the place of a missing or damaged one."""
    maker = subject.maker(path)
    if maker is None:
        return f"{key}=FILE with rows in verl's schema"
    anew = subject.making(maker)
    return f"remove {maker.output}, then {anew}" if maker.output.exists() else anew


def check_schema(subject: Subject) -> Finding:
    """Whether every row holds chat messages, a data source and a ground truth."""
    own = subject.get("data.custom_cls.path")
    if own:
        return skipped("schema", f"data.custom_cls.path={own} reads the rows in its own way")
    key = subject.get("data.prompt_key", "prompt")
    if key != "prompt":
        return skipped("schema", f"data.prompt_key={key}: the column prompt is not read")

    def schema() -> str:
        rows = sum(sample.rows for sample in subject.rows.values())
        return f"{rows} rows: chat messages, a data source and a ground truth in each"

    fix = 'a row needs data_source, prompt=[{"role": "user", "content": TEXT}] and reward_model'
    return attempt("schema", schema, f"{fix}={{ground_truth}}")


class Scores(NamedTuple):
    """What a reward function made of sampled rows.

    Attributes:
        wrong: score of a wrong response to each row that was scored.
        right: best score of the known answers, where one scores better than the wrong response.
        known: number of rows with a known answer.
        failures: row (1 is the first sampled) -> what was wrong.
        keys: names that it returned, each set once.
    """

    wrong: list[float]
    right: list[float]
    known: int
    failures: dict[int, str]
    keys: set[frozenset[str]]

    @property
    def rows(self) -> int:
        """Number of rows that were tried."""
        return len(self.wrong) + len(self.failures)


def check_reward(subject: Subject) -> Finding:
    """Score rows with the run's own reward function: a wrong response and, if known, a right one.

    The function runs in a process of its own, within the reward guard's time limit.
    """
    reason = _scored_otherwise(subject)
    if reason:
        return skipped("reward", reason)
    path, name, options = _named_function(subject)
    shown = f"{name} of {path}"
    fix = f"correct {path}, or reward.custom_reward_function.path and .name"
    guarded = subject.get("reward.reward_manager.name") == "guarded"
    try:
        settings = guard_section(subject.get("reward.guard"))
        function = GuardedFunction(path, name, settings.time_limit, settings.max_error_fraction)
    except HpoVerlError as problem:
        return error("reward", str(problem), fix)
    try:
        scores = _score(subject, function, options)
    finally:
        function.close()
    # What the guard does not bear, or nobody guards.
    borne = settings.max_error_fraction if guarded else 0.0
    if scores.failures:
        row, problem = next(iter(scores.failures.items()))
        if len(scores.failures) > borne * scores.rows:
            # Without the number of rows, which the clock decides.
            return error("reward", f"{shown}: fails on sampled row {row}: {problem}", fix)
        share = f"{len(scores.failures)} of {scores.rows} sampled rows"
        text = f"{shown}: fails on {share}, first on row {row}: {problem}"
        return warning("reward", text, fix)
    if len(scores.keys) > 1:
        return error("reward", f"{shown}: the keys it returns differ from row to row", fix)
    low = (
        f"{scores.rows} rows scored by {shown}: {min(scores.wrong):g} to {max(scores.wrong):g} "
        "for a wrong response"
    )
    known, right = scores.known, scores.right
    if not known:
        return ok("reward", f"{low}; no right response is known to compare with")
    if len(right) < known:
        return warning(
            "reward",
            f"{low}; in {known - len(right)} of {known} rows the known answer scores no better",
            "check that the reward function and the data belong together",
        )
    return ok("reward", f"{low}, up to {max(right):g} for the known answer in all {known}")


def _scored_otherwise(subject: Subject) -> str:
    """Why a plain call of a function would not be what the run does; empty if it would."""
    if subject.get("reward.reward_model.enable", False):
        return "a reward model scores, which runs only in the run"
    if subject.get("reward.sandbox_fusion.url"):
        return "reward.sandbox_fusion.url: a sandbox scores"
    if subject.get("reward.reward_manager.source") == "importlib":
        return "reward.reward_manager.source=importlib: that manager calls it in its own way"
    return ""


def _named_function(subject: Subject) -> tuple[str, str, dict[str, Any]]:
    """Path and name of the reward function, and the keywords that the configuration adds."""
    # verl lets the older key win.
    for key in ("custom_reward_function", "reward.custom_reward_function"):
        if path := subject.get(f"{key}.path"):
            options = subject.get(f"{key}.reward_kwargs") or {}
            return str(path), str(subject.get(f"{key}.name", "compute_score")), dict(options)
    return (*VERLS_FUNCTION, {})


def _score(subject: Subject, function: GuardedFunction, options: Mapping[str, Any]) -> Scores:
    chosen = [row for sample in subject.rows.values() for row in sample.spread.values()]
    chosen = chosen[:: max(1, len(chosen) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    scores = Scores([], [], 0, {}, set())
    deadline = time.monotonic() + SCORING_SECONDS
    known = 0
    for number, row in enumerate(chosen, start=1):
        if number > 1 and time.monotonic() > deadline:
            break
        # A wrong response alone first: where it hangs, the others would too.
        answers = function.score([_call(row, WRONG_RESPONSE, options)])
        texts = [] if answers[0][1] else list(right_responses(row))
        answers += function.score([_call(row, text, options) for text in texts])
        problem = next((problem for _, problem in answers if problem), "")
        if problem:
            scores.failures[number] = problem
            continue
        scores.keys.update(frozenset(result) for result, _ in answers)
        base, *best = map(_value, answers)
        scores.wrong.append(base)
        known += bool(best)
        scores.right.extend([max(best)] if best and max(best) > base else [])
    return scores._replace(known=known)


def _call(row: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as verl's reward managers give them."""
    return {
        "data_source": row["data_source"],
        "solution_str": response,
        "ground_truth": row["reward_model"]["ground_truth"],
        "extra_info": {**(row.get("extra_info") or {}), **MANAGER_INFO},
        **options,
    }


def _value(answer: Answer) -> float:
    result = answer[0]
    return float(result.get("score", result.get("acc", math.nan)))


def right_responses(row: Mapping[str, Any]) -> Iterator[str]:
    """Responses that hold a row's answer, where the row says it as text."""
    truth = row["reward_model"]["ground_truth"]
    for answer in ((row.get("extra_info") or {}).get("solution"), truth):
        if isinstance(answer, str) and answer:
            yield from (answer, f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}")


def check_prompts(subject: Subject) -> Finding:
    """Count the tokens of prompts: verl refuses one that is longer than the limit."""
    folder = subject.policy_folder
    if not folder.is_dir():
        return skipped("prompts", "the recipe's tokenizer cannot be read here")
    limit = subject.get("data.max_prompt_length")
    try:
        with quiet_imports():
            from hpo_verl.verl_plugin.preview import prompt_counter

            count = prompt_counter(subject.config, str(folder))
        longest, place = _longest(subject, count)
    except Exception as problem:
        return error(
            "prompts",
            f"the tokenizer of {folder} cannot encode them: {first_line(problem)}",
            "a tokenizer with a chat template, or actor_rollout_ref.model.custom_chat_template",
        )
    checked = sum(len({**s.spread, **s.longest}) for s in subject.rows.values())
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


def _longest(subject: Subject, count: Callable[[Any], int]) -> tuple[int, str]:
    """Tokens of the longest prompt, and where it is."""
    lengths = [
        (count(row["prompt"]), f"{path.name} row {position + 1}")
        for path, sample in subject.rows.items()
        for position, row in {**sample.spread, **sample.longest}.items()
    ]
    return max(lengths)
