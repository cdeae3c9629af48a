import runpy
from pathlib import Path

import pytest

from hpo_verl.rewards import countdown, telelogs
from hpo_verl.rewards.result import reward_result

FUZZER = runpy.run_path(str(Path(__file__).with_name("fuzz_rewards.py")))


def test_thirty_thousand_mutated_responses_find_no_fault():
    reasons, wrong = FUZZER["fuzz"](30_000, 1)
    assert wrong is None
    # The mutations reach the branches that matter, on both sides.
    assert {"correct", "no_answer", "not_an_expression", "wrong_numbers"} <= set(reasons)
    assert {"no_box", "not_a_cause", "unclosed_box"} <= set(reasons)


def test_same_seed_gives_the_same_run():
    assert FUZZER["fuzz"](2_000, 5) == FUZZER["fuzz"](2_000, 5)


def _careless_countdown(data_source, solution_str, ground_truth):
    """Score as the widely copied reward does: any digits, then `eval` without blanks."""
    text = solution_str.rpartition("<answer>")[2].partition("</answer>")[0].partition("=")[0]
    try:
        correct = (
            len(text) < 40
            and set(text) <= set("0123456789+-*/.() ")
            and "**" not in text
            and eval(text, {"__builtins__": {}}) == ground_truth["target"]  # noqa: S307
        )
    except Exception:
        correct = False
    return reward_result("correct" if correct else "?", well_formed=True)


def _slow_telelogs(data_source, solution_str, ground_truth):
    sum(range(1_000_000))
    return reward_result("?", well_formed=False)


def _raising(data_source, solution_str, ground_truth):
    raise RecursionError("too deep")


@pytest.mark.parametrize(
    ("module", "planted", "message"),
    [
        (countdown, _careless_countdown, "scored 1.0, the judge says 0.0"),
        (telelogs, _slow_telelogs, "took"),
        (countdown, _raising, "raised RecursionError"),
        (countdown, lambda *_: {"score": 1.0}, "malformed result"),
        (telelogs, lambda *_: reward_result("?", well_formed=False), "the judge says 1.0"),
    ],
)
def test_planted_faults_are_found(monkeypatch, module, planted, message):
    monkeypatch.setattr(module, "compute_score", planted)
    _, wrong = FUZZER["fuzz"](4_000, 2)
    assert wrong is not None
    assert message in wrong
