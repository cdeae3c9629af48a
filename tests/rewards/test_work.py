"""How much a reward does for a hostile response, counted in lines of Python."""

import sys

import pytest

from hpo_verl.rewards import countdown, telelogs

TRUTH = {"target": 20, "numbers": [3, 7, 2]}
# What the longest answer that is read may take; its length is bounded, that of a response is not.
MOST_LINES = 10_000


def lines_executed(reward, response, truth=TRUTH):
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        reward.compute_score("hostile", response, truth)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize(
    "unit",
    ["<answer>", "</answer>", "</answer", "<answer></answer>", "<answe", "r>", "<", "(", "1+", "×",
     "-", "9", "9/", "<answer>(", "=", " ", "\ud800", "<answer>1+2</answer>"],
)  # fmt: skip
def test_work_on_countdown_is_bounded_whatever_the_response(unit):
    for response in (
        unit * (100_000 // len(unit)),
        "<answer>" + unit * (99_000 // len(unit)) + "</answer>",
        "<answer>" + unit * (990 // len(unit)) + "</answer>",
        "<answer>" + unit * (250 // len(unit)) + "</answer>",
        "<answer>" + unit * (250 // len(unit)) + "1</answer>",
    ):
        assert lines_executed(countdown, response) < MOST_LINES


@pytest.mark.parametrize(
    "unit",
    ["\\boxed{", "{", "}", "\\text{", "\\", "\\boxed", "\\boxed{C3}", " ", "x", "\U0001f600", "{}"],
)
def test_work_on_telelogs_is_bounded_whatever_the_response(unit):
    for response in (
        unit * (100_000 // len(unit)),
        "\\boxed{" + unit * (99_000 // len(unit)) + "C3}",
        "\\boxed{" + unit * (50 // len(unit)) + "C3}",
        unit * (99_000 // len(unit)) + "\\boxed{C3}",
        unit * (1_000_000 // len(unit)),
    ):
        assert lines_executed(telelogs, response, "C3") < 300


def test_the_count_sees_work():
    short, long = ("<answer>" + "1+" * n + "1</answer>" for n in (10, 100))
    few, many = lines_executed(countdown, short), lines_executed(countdown, long)
    assert 5 * few < many < 15 * few
    assert lines_executed(telelogs, "\\boxed{" + " " * 60 + "C3}", "C3") > 120
