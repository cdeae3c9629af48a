"""Whether prompts are short enough, and rows hold what stages, hints and openings need."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hpo_verl.checks.configuration import planned_steps, rows_needed, trained_rows
from hpo_verl.checks.finding import Finding, error, ok, one_line, skipped, warning
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.rows import BATCH_ROWS
from hpo_verl.runs.quiet import quiet_imports


def _prompts(paths: list[Path]) -> Iterator[Any]:
    """The prompts of files, read bit by bit."""
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS, columns=["prompt"]):
            yield from batch["prompt"].to_pylist()


def check_prompts(run: PlannedRun) -> Finding:
    """Count the tokens of prompts: verl refuses one that is longer than the limit."""
    folder, limit = run.policy_folder, run.get("data.max_prompt_length")
    if not folder.is_dir():
        return skipped("the recipe's tokenizer cannot be read here")
    prompts = [
        (row["prompt"], f"{path.name} row {position + 1}")
        for path, sample in run.rows.items()
        for position, row in {**sample.spread, **sample.longest}.items()
    ]
    place, counts = "them", dict[str, int]()
    try:
        with quiet_imports():
            from hpo_verl.verl_plugin.prompt_tokens import prompt_counter

            count = prompt_counter(run.config, run.tokenizer)
        for prompt, place in prompts:
            counts[place] = count(prompt)
    except Exception as problem:
        return error(
            f"the tokenizer of {folder} cannot encode {place}: {one_line(problem)}",
            "a tokenizer with a chat template, or actor_rollout_ref.model.custom_chat_template",
        )
    longest, place = max((tokens, name) for name, tokens in counts.items())
    text = f"{longest} tokens in {place}, of {len(prompts)} prompts (the longest by letters)"
    fix = f"data.max_prompt_length={longest} or more"
    if longest <= limit:
        return ok(f"{text}; {limit} are permitted")
    text = f"data.max_prompt_length={limit}: {text}"
    if run.get("data.filter_overlong_prompts", False):
        for key, needed in (("data.train_files", rows_needed(run)), ("data.val_files", 1)):
            prompts_of = _prompts([path for other, path in run.data_files if other == key])
            kept = sum(1 for _ in islice((p for p in prompts_of if count(p) <= limit), needed))
            if kept < needed:
                text = f"data.max_prompt_length={limit}: verl leaves longer prompts out, and then"
                return error(f"{text} {key} has {kept} rows where the run needs {needed}", fix)
        return warning(f"{text}; verl leaves longer ones out", fix)
    return error(text, f"{fix}, or data.filter_overlong_prompts=true")


def check_curriculum(run: PlannedRun) -> list[Finding]:
    """Whether rows have the number by which a curriculum ranks them, and stages enough of both."""
    if not run.get("data.curriculum.by"):
        return []
    with quiet_imports():
        from hpo_verl.verl_plugin.curriculum import StagedSampler, curriculum_settings, difficulty

    settings, found = curriculum_settings(run.config), []
    paths = [path for key, path in run.data_files if key == "data.train_files"]
    for path in paths:
        for position, row in run.rows[path].spread.items():
            where = f"{path.name} row {position + 1}"
            found.append(difficulty(row, str(settings.by), where))
    rows = trained_rows(run, sum(run.rows[path].rows for path in paths))
    StagedSampler(
        [0.0] * rows,
        planned_steps(run) or settings.stages,
        run.get("data.train_batch_size"),
        settings,
        0,
    )
    text = f"{settings.stages} stages by {settings.by}, {min(found):g} to {max(found):g}"
    return [ok(f"{text} in {len(found)} sampled rows")]


def check_hints(run: PlannedRun) -> list[Finding]:
    """Whether rows have a reference solution for hints, and prompts with hints fit."""
    if not run.get("actor_rollout_ref.rollout.custom.hints.enable", False):
        return []
    with quiet_imports():
        from hpo_verl.verl_plugin import hints
        from hpo_verl.verl_plugin.prompt_tokens import prompt_counter

        count = prompt_counter(run.config, run.tokenizer)
    settings, limit = hints.hint_settings(run.config), run.get("data.max_prompt_length")
    paths = [path for key, path in run.data_files if key == "data.train_files"]
    rows = [row for path in paths for row in run.rows[path].spread.values()]
    known = hints.require_reference(rows, settings.by)
    lengths = []
    for row in rows:
        solution = hints.reference(row.get("extra_info"), settings.by)
        for share in settings.shares:
            if prompt := hints.hinted(row["prompt"], solution, share, settings.text):
                lengths.append(count(prompt))
    too_long = sum(length > limit for length in lengths)
    text = f"{known} of {len(rows)} sampled rows have a reference solution"
    if not too_long:
        return [ok(f"{text}; prompts with a hint have up to {max(lengths, default=0)} tokens")]
    text = f"data.max_prompt_length={limit}: {too_long} of {len(lengths)} prompts with a hint are"
    fix = f"data.max_prompt_length={max(lengths)}"
    if too_long == len(lengths):
        return [error(f"{text} longer, so none would be asked", fix)]
    return [warning(f"{text} longer, and not asked", fix)]


def check_openings(run: PlannedRun) -> list[Finding]:
    """Whether what the estimator gives responses as their beginning is there, and fits."""
    with quiet_imports():
        from hpo_verl.algorithms.registry import OUR_ESTIMATORS
        from hpo_verl.verl_plugin.advantages import read_settings

    estimator = OUR_ESTIMATORS.get(str(run.get("algorithm.adv_estimator", "")))
    if estimator is None or estimator.openings is None:
        return []
    openings = dict.fromkeys(estimator.openings(read_settings(estimator, run.config.algorithm)))
    limit = run.get("data.max_response_length")
    paths = [path for key, path in run.data_files if key == "data.train_files"]
    rows = [row for path in paths for row in run.rows[path].spread.values()]
    findings = []
    for text, name in openings:
        texts = [(row.get("extra_info") or {}).get(name) for row in rows] if name else [text]
        texts = [one for one in texts if isinstance(one, str) and one]
        if not texts:
            found = f"no sampled row of {paths[0]} has a text extra_info.{name}, a response to give"
            again = f"move {paths[0].parent} away if an older version prepared it"
            findings.append(error(found, f"{again}, and it is prepared anew; or add that text"))
            continue
        # A beginning needs a token after it, an answer the one that ends it.
        lengths = [len(run.tokenizer.encode(one, add_special_tokens=False)) + 1 for one in texts]
        too_long, longest = sum(length > limit for length in lengths), max(lengths)
        what = f"extra_info.{name} of {len(texts)} of {len(rows)} sampled rows" if name else text
        told = f"{what!r}: up to {longest} tokens" if text else f"{what}: up to {longest} tokens"
        fix = f"data.max_response_length={longest} or more"
        if too_long == len(lengths):
            findings.append(error(f"data.max_response_length={limit}: {told}", fix))
        elif too_long:
            told = f"{told}; {too_long} are too long, and not given"
            findings.append(warning(f"data.max_response_length={limit}: {told}", fix))
        else:
            findings.append(ok(told))
    return findings
