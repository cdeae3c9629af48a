"""Why methods differ: what the positive and the negative advantages of a step do, each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from hpo_verl.report.comparison import Comparison
from hpo_verl.report.effects import NOT_RUN
from hpo_verl.report.markdown import markdown_table
from hpo_verl.report.statistics import summary
from hpo_verl.report.studies import DISSECTED, Result

COLUMNS = {
    DISSECTED: "norm, positives",
    "negative_gradient_norm": "norm, negatives",
    "gradient_cosine": "cosine",
    "right_shift_positive": "right answers, by positives",
    "right_shift_negative": "right answers, by negatives",
}
"""Columns of a dissected step, and their titles."""
WHEN = ("first", "later")


def dissections(comparison: Comparison) -> str:
    """Markdown: interquartile means over seeds at the first dissected step, and at later ones."""
    rows: list[dict[str, Any]] = []
    for regime, variants in comparison.runs.items():
        for variant, runs in variants.items():
            # What another study has lent is shown there.
            own = [run for run in runs["result"] if run.cell["study"] == comparison.study]
            found = _by_run(own)
            for when in WHEN:
                if found[when].empty:
                    continue
                row: dict[str, Any] = {"regime": comparison.title(regime)}
                row |= {"method": f"`{variant}`", "steps": when, "runs": len(found[when])}
                row |= {text: summary(found[when][key]) for key, text in COLUMNS.items()}
                rows.append(row)
    return markdown_table(rows) or NOT_RUN


def _by_run(results: Sequence[Result]) -> dict[str, pd.DataFrame]:
    """A row per run: its first dissected step, and the mean over its later ones."""
    found: dict[str, list[dict[str, float]]] = {when: [] for when in WHEN}
    for result in results:
        rows = result.rows
        if DISSECTED not in rows or not rows[DISSECTED].notna().any():
            continue
        dissected = rows.dropna(subset=DISSECTED).reindex(columns=list(COLUMNS))
        found["first"].append(dict(dissected.iloc[0]))
        if len(dissected) > 1:
            found["later"].append(dict(dissected.iloc[1:].mean()))
    return {when: pd.DataFrame(rows, columns=list(COLUMNS)) for when, rows in found.items()}
