"""The learning rate of a method, chosen on seeds that are not compared: by lab and report alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpo_verl.report.statistics import measures
from hpo_verl.report.studies import Result


def area_of(result: Result) -> float:
    """Area under a run's curve of success, divided by its budget."""
    measured = result.measured
    return measures(measured["step"], measured["success"])["area"]


def best_rate(areas: Mapping[float, Sequence[float]]) -> float:
    """The rate with the largest mean area; of equal ones the smallest.

    Args:
        areas: For every rate the area of each of its runs, one at least.
    """
    return min(areas, key=lambda rate: (-sum(areas[rate]) / len(areas[rate]), rate))
