"""How long the Countdown reward takes."""

import time

import pytest

from hpo_verl.rewards.countdown import compute_score

TRUTH = {"target": 20, "numbers": [3, 7, 2]}


@pytest.mark.parametrize(
    "unit",
    ["<answer>", "</answer>", "</answer", "<answer></answer>", "<answe", "r>", "<", "(", "1+", "×",
     "-", "9", "9/", "<answer>(", "=", " ", "\ud800", "<answer>1+2</answer>"],
)  # fmt: skip
def test_no_input_takes_five_milliseconds(unit):
    for response in (
        unit * (100_000 // len(unit)),
        "<answer>" + unit * (99_000 // len(unit)) + "</answer>",
        "<answer>" + unit * (990 // len(unit)) + "</answer>",
        "<answer>" + unit * (250 // len(unit)) + "</answer>",
        "<answer>" + unit * (250 // len(unit)) + "1</answer>",
    ):
        times = []
        for _ in range(5):
            started = time.thread_time()
            compute_score("countdown", response, TRUTH)
            times.append(time.thread_time() - started)
        assert min(times) < 0.005


def test_speed_is_at_least_fifty_thousand_a_second():
    response = "Try 3 + 7 = 10, then 10 * 2 = 20. " * 30 + "<answer>(3 + 7) * 2 = 20</answer>"
    rates = []
    for _ in range(3):
        started = time.thread_time()
        for _ in range(5_000):
            compute_score("countdown", response, TRUTH)
        rates.append(5_000 / (time.thread_time() - started))
    assert max(rates) > 50_000
