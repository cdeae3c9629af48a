"""Blocks of the page of evidence, each from the kept runs alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo_verl.report.comparison import Comparison
from hpo_verl.report.dissections import dissections
from hpo_verl.report.effect_map import LENGTHS, SPARSITY, caption, draw_map
from hpo_verl.report.effects import NOT_RUN, TERMS, study_text
from hpo_verl.report.markdown import markdown_table
from hpo_verl.report.rates import chosen_rates, stable_rates
from hpo_verl.report.recommendations import (
    LEAST_PAIRS,
    RULE,
    read_questions,
    recommendations,
    require_known,
)
from hpo_verl.report.studies import Result
from hpo_verl.report.verl_pairs import verl_text
from hpo_verl.report.verl_runs import VerlRun

MAP, QUESTIONS = "map.svg", "comparisons.yaml"
STABLE = "rates"
"""The study that crosses learning rates up to collapse."""
VERL = "through verl"


def blocks(
    studies: Mapping[str, Comparison], runs: Sequence[VerlRun], folder: Path
) -> dict[str, str]:
    """Every block of the page by name; draws the map into the folder.

    Args:
        studies: All studies of `recipes/lab` by name, with or without runs.
        runs: Those through verl.
        folder: Where the page lies; it holds the questions of the recommendations.
    """
    every = list(studies.values())
    questions = read_questions(folder / QUESTIONS)
    require_known(folder / QUESTIONS, questions, every)
    lengths = [studies[name] for name in LENGTHS]
    draw_map(studies[SPARSITY], lengths, folder / MAP)
    text = caption(studies[SPARSITY], lengths)
    return {
        "terms": f"{TERMS}\n- A claim needs {LEAST_PAIRS} pairs.",
        "map": f"![Effects over sparsity and length ratio]({MAP})\n\n{text}",
        "recommendations": f"{recommendations(every, questions)}\n\n{RULE}",
        "effects": "\n\n".join(f"### {one.study}\n\n{study_text(one)}" for one in every),
        "rates": _rates(every, studies[STABLE]),
        "why": _why(every),
        "verl": verl_text(runs),
        "hours": hours(manifest(every, runs)),
    }


def _rates(every: Sequence[Comparison], stable: Comparison) -> str:
    parts = [
        f"### Chosen in `{study.study}`\n\n{chosen_rates(study)}"
        for study in every
        if study.plan.tuned
    ]
    return "\n\n".join(
        [*parts, f"### Collapsed runs in `{stable.study}`\n\n{stable_rates(stable)}"]
    )


def _why(every: Sequence[Comparison]) -> str:
    found = {study.study: dissections(study) for study in every}
    parts = [f"### {name}\n\n{text}" for name, text in found.items() if text != NOT_RUN]
    return "\n\n".join(parts) or NOT_RUN


def manifest(studies: Sequence[Comparison], runs: Sequence[VerlRun] = ()) -> dict[str, Any]:
    """What every study with runs, and the runs through verl, were made with."""
    found = {study.study: study_facts(study.results) for study in studies if study.results}
    if runs:
        facts = [run.facts for run in runs]
        environments = [{key: one[key] for key in ("commit", "versions")} for one in facts]
        found[VERL] = {
            "runs": len(facts),
            "diverged": 0,
            "seeds": sorted({one["seed"] for one in facts if one["seed"] is not None}),
            "hours": round(sum(one["seconds"] for one in facts) / 3600, 2),
            "environments": _different(environments),
        }
    return found


def study_facts(results: Sequence[Result]) -> dict[str, Any]:
    """What some runs were made with."""
    environments = []
    for result in results:
        made = {k: v for k, v in result.facts["environment"].items() if k != "finished"}
        # The lab keeps versions as text.
        versions = made["versions"]
        made["versions"] = json.loads(versions) if isinstance(versions, str) else versions
        environments.append(made)
    return {
        "runs": len(results),
        "diverged": sum(result.facts["status"] == "diverged" for result in results),
        "seeds": sorted({result.cell["seed"] for result in results}),
        "hours": round(sum(result.facts["seconds"] for result in results) / 3600, 2),
        "environments": _different(environments),
    }


def _different(environments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in sorted({json.dumps(one) for one in environments})]


def hours(facts: Mapping[str, Any]) -> str:
    """Markdown table of a manifest: runs, hours, commits and versions, and the sum of all."""
    if not facts:
        return NOT_RUN
    rows = [_hours_row(name, [study]) for name, study in facts.items()]
    rows.append(_hours_row("**all**", list(facts.values())))
    return markdown_table(rows)


def _hours_row(name: str, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    environments = [environment for one in facts for environment in one["environments"]]
    versions = {
        f"{package} {version}"
        for environment in environments
        for package, version in environment["versions"].items()
    }
    return {
        "study": name,
        "runs": sum(one["runs"] for one in facts),
        "diverged": sum(one["diverged"] for one in facts),
        "hours": format(sum(one["hours"] for one in facts), ".1f"),
        "machine": _listed(one["machine"] for one in environments if "machine" in one),
        "commits": _listed(one["commit"] for one in environments),
        "versions": _listed(versions),
    }


def _listed(texts: Any) -> str:
    return "; ".join(sorted(set(texts)))
