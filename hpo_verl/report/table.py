"""The table of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from hpo_verl.report.intervals import bootstrap_interval
from hpo_verl.report.runs import Group, Run

NOT_MEASURED = "-"


def runs_table(groups: Sequence[Group]) -> Table:
    """One row a run; one more for each group of several seeds, with mean and interval."""
    table = Table(
        title="success on held-out prompts; mean [95 % bootstrap interval over seeds]",
        box=box.SIMPLE,
        caption="\n".join(
            f"group {number}: {group.settings}"
            for number, group in enumerate(groups, 1)
            if group.settings
        ),
        caption_justify="left",
    )
    for name in ("recipe", "algorithm"):
        table.add_column(name, overflow="fold")
    for name in ("group", "seed", "steps", "before", "after", "s/step"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, group in enumerate(groups, 1):
        for run in group.runs:
            table.add_row(
                run.recipe,
                run.algorithm,
                str(number),
                NOT_MEASURED if run.seed is None else str(run.seed),
                str(run.steps),
                _percent(run.before),
                _percent(run.after),
                _seconds(run.seconds_per_step),
            )
        if len(group.runs) > 1:
            table.add_row(
                "",
                f"mean of {len(group.runs)} seeds",
                str(number),
                *("", ""),
                _mean(group, lambda run: run.before, _percent),
                _mean(group, lambda run: run.after, _percent),
                _mean(group, lambda run: run.seconds_per_step, _seconds),
                style="bold",
                end_section=True,
            )
    return table


def _mean(
    group: Group, pick: Callable[[Run], float | None], show: Callable[[float | None], str]
) -> str:
    picked = [pick(run) for run in group.runs]
    values = [value for value in picked if value is not None]
    if len(values) < len(picked):
        # A mean over other seeds than the row says would mislead.
        return NOT_MEASURED
    text = show(sum(values) / len(values))
    interval = bootstrap_interval(values)
    return f"{text} [{show(interval[0])}, {show(interval[1])}]" if interval else text


def _percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1%}"


def _seconds(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}"
