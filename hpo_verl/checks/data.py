"""Whether the data are there, in verl's schema, and scored by the reward."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from hpo_verl.checks.configuration import trained_rows
from hpo_verl.checks.finding import Finding, error, ok, one_line, skipped, warning
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.rows import REQUIRED_COLUMNS, SAMPLE_ROWS
from hpo_verl.config.settings import ROLLOUT
from hpo_verl.errors import ConfigError, DataError, HpoVerlError
from hpo_verl.rewards.guarded_function import VERLS_FUNCTION, GuardedFunction, guard_section
from hpo_verl.rewards.scoring_process import shape
from hpo_verl.runs.quiet import quiet_imports

# verl reads data with `datasets`, which takes these for a pattern or a chain of places.
_PATTERN = re.compile(r"[*?]|\[.*\]|::")
NO_PATTERN = "must hold no *, ?, [ ] or :: in its path, which datasets takes for a pattern"
WRONG_RESPONSE = "I do not know."
# Rewards that are slow are tried on fewer rows: no further row is begun after this time.
SCORING_SECONDS = 5.0
VALIDATED = f"{ROLLOUT}.val_kwargs.n"
# What verl's reward managers add to a row's `extra_info`.
MANAGER_INFO = {"num_turns": 2, "rollout_reward_scores": {}}


def check_files(run: PlannedRun) -> Finding:
    """Whether every data file is a parquet file with verl's columns and enough rows."""
    found: list[str] = []
    trained = 0
    for key, path in run.data_files:
        try:
            run.check_made(path)
            rows = _rows(key, path)
        except DataError as problem:
            anew = run.how_to_make(path, f"{key}=FILE with rows in verl's schema")
            return error(str(problem), anew)
        trained += rows if key == "data.train_files" else 0
        found.append(f"{path} ({rows} rows)")
    for key in ("data.train_files", "data.val_files"):
        if key not in dict(run.data_files):
            return error(f"{key}: names no file", f"{key}=FILE")
        if problem := _not_together([path for other, path in run.data_files if other == key]):
            return error(f"{key}: {problem}", "files with the same columns and types")
    shown, batch = ", ".join(found), run.get("data.train_batch_size")
    trained = trained_rows(run, trained)
    if trained < batch:
        return error(
            f"data.train_files: {trained} rows to train on are fewer than "
            f"data.train_batch_size={batch}, which gives 0 steps",
            "a smaller data.train_batch_size, or more data",
        )
    return ok(shown)


def is_pattern(path: Path) -> bool:
    """Whether verl would take a data file's path for a pattern, and not find the file."""
    return bool(_PATTERN.search(str(path.absolute())))


def _rows(key: str, path: Path) -> int:
    """Number of rows of a file; a DataError where it cannot be trained on."""
    if not path.is_file():
        raise DataError(f"{key}: {path} does not exist")
    if is_pattern(path):
        raise DataError(f"{key}: {path} {NO_PATTERN}")
    try:
        table = pq.ParquetFile(path)
    except Exception as problem:
        text = f"{key}: {path} is not a complete parquet file ({one_line(problem)})"
        raise DataError(text) from problem
    names = table.schema_arrow.names
    fields = [table.schema.column(i).path for i in range(len(table.schema))]
    for found in (names, fields):
        if twice := [name for name, count in Counter(found).items() if count > 1]:
            raise DataError(f"{key}: {path} has the column {twice[0]!r} more than once")
    absent = [name for name in REQUIRED_COLUMNS if name not in names]
    if absent:
        raise DataError(f"{key}: {path} has no column {absent[0]!r}")
    if table.metadata.num_rows < 1:
        raise DataError(f"{key}: {path} has no rows")
    return table.metadata.num_rows


def _not_together(paths: list[Path]) -> str:
    """Why verl cannot read several files as one; empty where it can."""
    if len(paths) < 2:
        return ""
    from datasets import Dataset, Features, concatenate_datasets

    # Of one row, since those without rows are not compared.
    tables = []
    for path in paths:
        features = Features.from_arrow_schema(pq.ParquetFile(path).schema_arrow)
        tables.append(Dataset.from_dict({name: [None] for name in features}, features=features))
    for path, table in zip(paths[1:], tables[1:], strict=True):
        try:
            concatenate_datasets([tables[0], table])
        except ValueError as problem:
            return f"{path} does not go with {paths[0]}: {one_line(problem)}"
    return ""


def check_schema(run: PlannedRun) -> Finding:
    """Whether every row holds chat messages, a data source and a ground truth."""
    if own := run.get("data.custom_cls.path"):
        return skipped(f"data.custom_cls.path={own} reads the rows in its own way")
    if (key := run.get("data.prompt_key", "prompt")) != "prompt":
        return skipped(f"data.prompt_key={key}: the column prompt is not read")
    rows = sum(sample.rows for sample in run.rows.values())
    return ok(f"{rows} rows: chat messages, a data source and a ground truth in each")


class Scored(NamedTuple):
    """What a reward function made of a sampled row: scores, or what went wrong (`problem`)."""

    wrong: float = math.nan
    # The best of the known answers; None where none is known.
    right: float | None = None
    # Names that it returned, each set once.
    keys: frozenset[frozenset[str]] = frozenset()
    # Those names with what the value was; without None, which verl leaves out.
    kinds: frozenset[tuple[str, str]] = frozenset()
    problem: str = ""
    # File and row.
    place: str = ""


def check_reward(run: PlannedRun) -> Finding:
    """Score rows with the run's own reward function: a wrong response and, if known, a right one.

    The function runs in a process of its own, within the reward guard's time limit.
    """
    for key, value, reason in (
        ("reward_model.enable", True, "a reward model scores, which runs only in the run"),
        ("reward_manager.source", "importlib", "that manager calls the reward in its own way"),
        ("sandbox_fusion.url", run.get("reward.sandbox_fusion.url"), "a sandbox scores"),
    ):
        if value and run.get(f"reward.{key}") == value:
            return skipped(f"reward.{key}={value}: {reason}")
    path, name, options = _named_function(run)
    shown = f"{name} of {path}"
    fix = f"correct {path}, or reward.custom_reward_function.path and .name"
    try:
        guard = guard_section(run.get("reward.guard"))
        function = GuardedFunction(path, name, guard)
    except HpoVerlError as problem:
        return error(str(problem), fix)
    try:
        scored = list(_score(run, function, options))
    finally:
        function.close()
    failures = {one.place: one.problem for one in scored if one.problem}
    if failures:
        row, problem = next(iter(failures.items()))
        guarded = run.get("reward.reward_manager.name") == "guarded"
        if len(failures) > (guard.max_error_fraction if guarded else 0) * len(scored):
            # Without the number of rows, which the clock decides.
            return error(f"{shown}: fails on {row}: {problem}", fix)
        share = f"{len(failures)} of {len(scored)} sampled rows"
        return warning(f"{shown}: fails on {share}, first on {row}: {problem}", fix)
    if len(frozenset().union(*(one.keys for one in scored))) > 1:
        return error(f"{shown}: the keys it returns differ from row to row", fix)
    if problem := _not_returned(run, frozenset().union(*(one.kinds for one in scored))):
        return error(f"{shown}: {problem}", fix)
    if problem := _not_validated(run, frozenset().union(*(one.kinds for one in scored))):
        return error(f"{shown}: {problem}", fix)
    wrong = [one.wrong for one in scored]
    low = (
        f"{len(scored)} rows scored by {shown}: {min(wrong):g} to {max(wrong):g} for a wrong "
        "response"
    )
    known = [(one.wrong, one.right) for one in scored if one.right is not None]
    if not known:
        return ok(f"{low}; no right response is known to compare with")
    if no_better := sum(right <= wrong for wrong, right in known):
        return warning(
            f"{low}; in {no_better} of {len(known)} rows the known answer scores no better",
            "check that the reward function and the data belong together",
        )
    best = max(right for _, right in known)
    return ok(f"{low}, up to {best:g} for the known answer in all {len(known)}")


def _kind(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {' x '.join(map(str, shape(value)))}"
    return "a text" if isinstance(value, str) else "a number"


def _not_returned(run: PlannedRun, kinds: frozenset[tuple[str, str]]) -> str:
    """Which number the algorithm reads and the reward does not return; empty if it returns all."""
    with quiet_imports():
        from hpo_verl.algorithms.registry import OUR_ESTIMATORS
        from hpo_verl.verl_plugin.advantages import reward_names

    name = str(run.get("algorithm.adv_estimator"))
    if not kinds or (estimator := OUR_ESTIMATORS.get(name)) is None:
        return ""
    numbers = sorted({key for key, kind in kinds if kind == "a number"})
    try:
        names = reward_names(estimator, run.config.algorithm)
    except ConfigError:
        # Wrong settings, which their own check names.
        return ""
    for read in names:
        if read not in numbers:
            return (
                f"returns no number {read!r}, which algorithm.adv_estimator={name} reads; it "
                f"returns {', '.join(numbers)}"
            )
    return ""


def _not_validated(run: PlannedRun, kinds: frozenset[tuple[str, str]]) -> str:
    """Why verl's validation fails of the kinds of what a reward returns; empty if it does not.

    Of several responses to a prompt it averages the values, and lets `pred` vote for one.
    """
    responses, names = run.get(VALIDATED, 1), dict(kinds)
    for key in sorted(names):
        found = sorted((kind for other, kind in kinds if other == key), reverse=True)
        is_list = [kind.startswith("a list") for kind in found]
        if len(found) > 1 and (responses > 1 or not all(is_list)):
            return f"{key!r} is {found[0]} in some rows and {found[1]} in others"
        if responses > 1 and is_list[0] and "pred" in names:
            return f"{key!r} is a list: with {VALIDATED}={responses} and 'pred' verl needs numbers"
    return ""


def _named_function(run: PlannedRun) -> tuple[str, str, dict[str, Any]]:
    """Path and name of the reward function, and the keywords that the configuration adds."""
    section = "reward.custom_reward_function"
    if path := run.get(f"{section}.path"):
        options = run.get(f"{section}.reward_kwargs", {})
        return str(path), str(run.get(f"{section}.name", "compute_score")), dict(options)
    return (*VERLS_FUNCTION, {})


def _score(
    run: PlannedRun, function: GuardedFunction, options: Mapping[str, Any]
) -> Iterator[Scored]:
    rows = [
        (f"{path.name} row {position + 1}", row)
        for path, sample in run.rows.items()
        for position, row in sample.spread.items()
    ]
    rows = rows[:: max(1, len(rows) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    deadline = time.monotonic() + SCORING_SECONDS
    for number, (place, row) in enumerate(rows):
        if number > 0 and time.monotonic() > deadline:
            return
        # A wrong response alone first: where it hangs, the others would too.
        answers = function.score([_call(row, WRONG_RESPONSE, options)])
        texts = [] if answers[0][1] else list(right_responses(row))
        answers += function.score([_call(row, text, options) for text in texts])
        if problem := next((problem for _, problem in answers if problem), ""):
            yield Scored(problem=problem, place=place)
            continue
        keys = frozenset(frozenset(result) for result, _ in answers)
        kinds = frozenset(
            (key, _kind(value))
            for result, _ in answers
            for key, value in result.items()
            if value is not None
        )
        wrong, *right = (
            float(result.get("score", result.get("acc", math.nan))) for result, _ in answers
        )
        yield Scored(wrong, max(right, default=None), keys, kinds)


def _call(row: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as verl's reward managers give them."""
    return {
        "data_source": row["data_source"],
        "solution_str": response,
        "ground_truth": row["reward_model"]["ground_truth"],
        "extra_info": {**(row.get("extra_info") or {}), **MANAGER_INFO},
        **options,
    }


def right_responses(row: Mapping[str, Any]) -> Iterator[str]:
    """Responses that hold a row's answer, where the row says it as text or number."""
    truth = row["reward_model"]["ground_truth"]
    for answer in ((row.get("extra_info") or {}).get("solution"), truth):
        if isinstance(answer, str | int | float) and answer != "":
            yield from (f"{answer}", f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}")
