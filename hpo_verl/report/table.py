"""The table of a comparison of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from hpo_verl.report.runs import Group
from hpo_verl.report.statistics import mean_interval

NOT_MEASURED = "-"
_NUMBERS = {"before": ".1%", "after": ".1%", "seconds_per_step": ".1f"}


def runs_table(groups: Sequence[Group]) -> str:
    """One row a run; one more for each group of several seeds, with mean and interval."""
    rows = []
    for number, group in enumerate(groups, 1):
        values = pd.DataFrame(
            [{name: getattr(run, name) for name in _NUMBERS} for run in group.runs], dtype=float
        )
        for run, (_, numbers) in zip(group.runs, values.iterrows(), strict=True):
            rows.append(
                [run.recipe, run.algorithm, number, _shown(run.seed, ""), run.steps]
                + [_shown(numbers[name], template) for name, template in _NUMBERS.items()]
            )
        if len(group.runs) > 1:
            # A mean over other seeds than the row says would mislead.
            means = [
                NOT_MEASURED
                if values[name].isna().any()
                else mean_interval(values[name].tolist()).shown(template)
                for name, template in _NUMBERS.items()
            ]
            rows.append(["", f"mean of {len(group.runs)} seeds", number, "", "", *means])
    names = ["recipe", "algorithm", "group", "seed", "steps", "before", "after", "s/step"]
    captions = [f"group {n}: {group.settings}" for n, group in enumerate(groups, 1)]
    return "\n".join(
        [
            "success on held-out prompts; mean [95 % bootstrap interval over seeds]",
            pd.DataFrame(rows, columns=names).to_string(index=False),
            *(text for text in captions if not text.endswith(": ")),
        ]
    )


def _shown(value: Any, template: str) -> str:
    return NOT_MEASURED if value is None or pd.isna(value) else format(value, template)
