"""Tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpo_verl.report.statistics import Interval

NUMBER = ".3f"
"""Format of the numbers of a table; other formats are made into text by who fills the row."""


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table: title of a column -> text, number, `Interval`, or None for an empty cell.

    Titles stand in the order in which the rows first name them. Columns without any value are
    left out; without rows there is no table, but an empty text.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = [[_shown(row.get(title)) for title in titles] for row in rows]
    used = [i for i in range(len(titles)) if any(line[i] for line in cells)]
    lines = [titles, ["---"] * len(titles), *cells] if rows else []
    return "\n".join(f"| {' | '.join(line[i] for i in used)} |" for line in lines)


def signed(value: Interval) -> str:
    """A difference: with its sign, and its bounds with theirs."""
    return value.shown(f"+{NUMBER}")


def percent(share: float) -> str:
    """A round share as per cent."""
    return f"{100 * share:.0f} %"


def names(variants: Sequence[str]) -> str:
    """Names of methods as code."""
    return ", ".join(f"`{variant}`" for variant in variants)


def _shown(value: Any) -> str:
    if isinstance(value, Interval):
        return value.shown(NUMBER)
    if isinstance(value, float):
        return "" if math.isnan(value) else format(value, NUMBER)
    return "" if value is None else str(value)
