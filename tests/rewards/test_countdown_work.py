"""How much the Countdown reward does for a hostile response, counted in lines of Python."""

import sys

import pytest

from hpo_verl.rewards.countdown import compute_score

TRUTH = {"target": 20, "numbers": [3, 7, 2]}
# What the longest answer that is read may take; its length is bounded, that of a response is not.
MOST_LINES = 10_000


def lines_executed(response):
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        compute_score("countdown", response, TRUTH)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize(
    "unit",
    ["<answer>", "</answer>", "</answer", "<answer></answer>", "<answe", "r>", "<", "(", "1+", "×",
     "-", "9", "9/", "<answer>(", "=", " ", "\ud800", "<answer>1+2</answer>"],
)  # fmt: skip
def test_work_is_bounded_whatever_the_response(unit):
    for response in (
        unit * (100_000 // len(unit)),
        "<answer>" + unit * (99_000 // len(unit)) + "</answer>",
        "<answer>" + unit * (990 // len(unit)) + "</answer>",
        "<answer>" + unit * (250 // len(unit)) + "</answer>",
        "<answer>" + unit * (250 // len(unit)) + "1</answer>",
    ):
        assert lines_executed(response) < MOST_LINES


def test_the_count_sees_work():
    short, long = ("<answer>" + "1+" * n + "1</answer>" for n in (10, 100))
    assert 5 * lines_executed(short) < lines_executed(long) < 15 * lines_executed(short)
