"""Curriculum and hints are looked at with the training file's rows before anything starts."""

import pytest

from hpo_verl.checks.list import CHECKS, run_checks

HINTS = "actor_rollout_ref.rollout.custom.hints"


@pytest.fixture
def look(planned):
    """A function: settings of a curriculum, or of hints -> what the check finds."""
    first = ("data files", "schema", "model", "remote code", "tokenizer")

    def run(name="curriculum", **changes):
        section = "data.curriculum" if name == "curriculum" else HINTS
        limit = changes.pop("limit", 16)
        settings = {f"{section}.{key}": value for key, value in changes.items()}
        settings["data.max_prompt_length"] = limit
        wanted = [check for check in CHECKS if check.name in (*first, name)]
        findings = list(run_checks(planned(settings), wanted))
        return [f for f in findings if f.name == name]

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
        ({"by": "difficulty", "stages": 0}, "stages = 0: must be an integer of at least 1"),
    ],
)
def test_what_would_fail_is_refused(look, changes, words):
    (finding,) = look(**changes)
    assert finding.status == "error"
    assert words in finding.detail
    assert finding.fix == "another data.curriculum, or rows with that number in extra_info"


def test_hints_that_fit(look):
    assert look("hints") == []
    (finding,) = look("hints", enable=True, text=" ", limit=40)
    assert finding.status == "ok"
    assert finding.detail.startswith(
        "100 of 100 sampled rows have a reference solution; prompts with a hint have up to "
    )


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"text": " " * 80}, "error", "prompts with a hint are longer, so none would be asked"),
        ({"text": " ", "limit": 21}, "warning", "prompts with a hint are longer, and not asked"),
        ({"by": "numbers"}, "error", "hints.by = 'numbers': no sampled row has a text"),
        ({"shares": [2]}, "error", "hints.shares = 2: must be a number in (0, 1]"),
    ],
)
def test_hints_that_do_not(look, changes, status, words):
    (finding,) = look("hints", enable=True, **changes)
    assert finding.status == status
    assert words in finding.detail
