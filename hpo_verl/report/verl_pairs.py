"""Pairs of runs through verl: same recipe, seed, policy, data and settings, another algorithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from hpo_verl.report.effects import NOT_RUN
from hpo_verl.report.markdown import markdown_table
from hpo_verl.report.statistics import LEAST_SEEDS, effect, measures
from hpo_verl.report.verl_runs import VerlRun, nearest_recipe

BASELINE = "grpo"
_FILES = {"policy": "another first policy", "data": "other data"}


class Pair(NamedTuple):
    """A run and the baseline's run that it is compared with; None where there is none, and why."""

    run: VerlRun
    baseline: VerlRun | None
    reason: str = ""


def obstacle(run: VerlRun, other: VerlRun) -> str:
    """Why two runs are no pair, in words; empty where they are one."""
    ours, theirs = run.facts, other.facts
    for key, text in _FILES.items():
        if ours[key] != theirs[key]:
            return text
    if ours["steps"] != theirs["steps"]:
        return f"{ours['steps']} steps against {theirs['steps']}"
    here, there = ours["settings"], theirs["settings"]
    # What the two algorithms set is what is compared.
    own = nearest_recipe(here).keys() | nearest_recipe(there).keys()
    for key in sorted(here | there):
        if key not in own and here.get(key) != there.get(key):
            return f"{key}: {here.get(key)} against {there.get(key)}"
    return ""


def paired(runs: Sequence[VerlRun]) -> list[Pair]:
    """Every run, with the baseline's run of the same recipe and seed, if the two are a pair."""
    pairs = []
    for run in runs:
        if run.facts["algorithm"] == BASELINE:
            pairs.append(Pair(run, None))
            continue
        alike = [
            other
            for other in runs
            if other.facts["algorithm"] == BASELINE
            and all(other.facts[key] == run.facts[key] for key in ("recipe", "seed"))
        ]
        reasons = [obstacle(run, other) for other in alike]
        if "" in reasons:
            pairs.append(Pair(run, alike[reasons.index("")]))
        else:
            nothing = f"no run of `{BASELINE}` with this recipe and seed"
            pairs.append(Pair(run, None, reasons[0] if reasons else nothing))
    return pairs


def verl_text(runs: Sequence[VerlRun]) -> str:
    """Markdown: a row per run, then every algorithm against the baseline, then what is no pair."""
    if not runs:
        return NOT_RUN
    pairs = paired(runs)
    text = [markdown_table([_row(pair) for pair in pairs]), markdown_table(_summaries(pairs))]
    unpaired = [
        "- `{algorithm}`, {recipe}, seed {seed}: ".format(**pair.run.facts) + pair.reason
        for pair in pairs
        if pair.reason
    ]
    if unpaired:
        text.append("Not paired:\n\n" + "\n".join(unpaired))
    return "\n\n".join(part for part in text if part)


def _area(run: VerlRun) -> float:
    curve = run.curve
    if len(curve) < 2 or curve.index[0] != 0:
        return math.nan
    return measures(curve.index, curve)["area"]


def _row(pair: Pair) -> dict[str, Any]:
    facts, curve = pair.run.facts, pair.run.curve
    lengths = pair.run.rows[["response_length_positive", "response_length_negative"]].dropna()
    return {
        "recipe": facts["recipe"],
        "seed": facts["seed"],
        "algorithm": f"`{facts['algorithm']}`",
        "steps": facts["steps"],
        "before": format(curve.iloc[0], ".1%") if len(curve) and curve.index[0] == 0 else None,
        "after": format(curve.iloc[-1], ".1%") if len(curve) else None,
        "area": _area(pair.run),
        f"area - {BASELINE}": format(_difference(pair), "+.3f") if pair.baseline else None,
        "first tokens, positive": _first(lengths, "response_length_positive"),
        "first tokens, negative": _first(lengths, "response_length_negative"),
        "first alpha": _first(pair.run.rows.dropna(subset="alpha"), "alpha", ".2f"),
        "hours": format(facts["seconds"] / 3600, ".1f"),
    }


def _first(rows: Any, column: str, template: str = ".1f") -> str | None:
    return format(rows[column].iloc[0], template) if len(rows) else None


def _difference(pair: Pair) -> float:
    return math.nan if pair.baseline is None else _area(pair.run) - _area(pair.baseline)


def _summaries(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """A row for every recipe and algorithm that has a pair."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        if pair.baseline is not None:
            groups.setdefault((pair.run.facts["recipe"], pair.run.facts["algorithm"]), []).append(
                pair
            )
    rows = []
    for (recipe, algorithm), members in groups.items():
        differences = dict(enumerate(map(_difference, members)))
        found = effect(differences, dict.fromkeys(differences, 0.0))
        if found.difference is None:
            shown = "not measured"
        elif found.pairs < LEAST_SEEDS:
            plural = "s" if found.pairs > 1 else ""
            shown = f"{found.difference.point:+.3f} ({found.pairs} pair{plural}: no interval)"
        else:
            shown = found.difference.shown("+.3f")
        rows.append(
            {
                "recipe": recipe,
                "algorithm": f"`{algorithm}`",
                "pairs": found.pairs,
                f"area - {BASELINE}": shown,
            }
        )
    return rows
