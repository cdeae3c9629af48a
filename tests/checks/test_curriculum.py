"""A curriculum is looked at with the rows of the training file before anything starts."""

import pytest

from hpo_verl.checks.list import CHECKS, run_checks


@pytest.fixture
def look(planned):
    """A function: settings -> what the check finds."""
    wanted = [check for check in CHECKS if check.name in ("data files", "schema", "curriculum")]

    def run(**changes):
        settings = {f"data.curriculum.{key}": value for key, value in changes.items()}
        findings = list(run_checks(planned(settings), wanted))
        return [f for f in findings if f.name == "curriculum"]

    return run


def test_without_one_nothing_is_said(look):
    assert look() == []


def test_a_number_of_all_rows_is_right(look):
    (finding,) = look(by="difficulty", descending=True)
    assert finding.status == "ok"
    assert finding.detail.startswith("3 stages by difficulty, 1 to ")
    assert finding.detail.endswith(" in 100 sampled rows")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"by": "level"}, "by = 'level': train.parquet row 1: extra_info.level = None, no number"),
        ({"by": "solution"}, "by = 'solution': train.parquet row 1: extra_info.solution = '"),
        ({"by": "difficulty", "stages": 241}, "stages = 241: must be at most the 30 steps"),
        ({"by": "difficulty", "stages": 0}, "stages = 0: must be a number in [1, inf)"),
    ],
)
def test_what_would_fail_is_refused(look, changes, words):
    (finding,) = look(**changes)
    assert finding.status == "error"
    assert words in finding.detail
    assert finding.fix == "another data.curriculum, or rows with that number in extra_info"
