"""Rewards for answers that are numbers or formulas."""

import pytest

from hpo_verl.errors import DataError
from hpo_verl.rewards import math_answer
from hpo_verl.rewards.guarded_function import GuardedFunction, RewardGuardSettings
from hpo_verl.rewards.math_answer import compute_score
from hpo_verl.rewards.result import MAX_RESPONSE_CHARACTERS


def result(response, truth="72"):
    found = compute_score("m", response, truth)
    assert found.keys() == {"score", "acc", "format", "reason"}
    assert found["score"] == found["acc"] == float(found["reason"] == "correct")
    return found


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("72", "72"),
        (72, "72"),
        (0.5, r"\frac{1}{2}"),
        ("1,234", "1234"),
        ("1234", "1,234"),
        ("Half of it.\n#### 72", "72"),
        (r"so \boxed{\frac{1}{2}}", "1/2"),
        ("$72$", "72.0"),
        ("72", r"\$72"),
        ("72", r"72\text{ dollars}"),
        ("-3", "−3"),
        ("x^2+1", "1+x^2"),
        (r"3\sqrt{2}", r"\sqrt{18}"),
        ("(1,2)", "(1, 2)"),
        ("3", "x=3"),
        ("B", r"\text{B}"),
    ],
)
def test_equal_answers(truth, answer):
    assert result(rf"Thus \boxed{{{answer}}}.", truth)["score"] == 1
    assert result(f"Thus <answer>{answer}</answer>", truth)["score"] == 1
    assert result(f"Thus\n#### {answer}\nDone.", truth)["score"] == 1


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (r"\boxed{71}", "wrong"),
        (r"\boxed{172}", "wrong"),
        (r"\boxed{72} or rather \boxed{71}", "wrong"),
        (r"\boxed{71, 72}", "wrong"),
        (r"\boxed{71$ or $72}", "wrong"),
        (r"\boxed{72 dollars}", "wrong"),
        (r"\boxed{seventy-two}", "wrong"),
        (r"<answer>72</answer> \boxed{71}", "wrong"),
        ("72", "no_answer"),
        ("", "no_answer"),
        (r"\boxed{}", "no_answer"),
        ("#### ", "no_answer"),
        (r"\boxed{72} \boxed{7", "no_answer"),
        (rf"\boxed{{{'1+' * 100}1}}", "long_answer"),
        (f"#### {'7' * 201}", "long_answer"),
        ("7" * (MAX_RESPONSE_CHARACTERS + 1), "too_long"),
    ],
)
def test_other_responses(response, reason):
    assert result(response)["reason"] == reason


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 30,
        r"\frac" * 30,
        "^" * 100,
        "__import__('os')",
        "\x00\ud800",
        r"\begin{matrix} 1 & ",
        "$" * 150,
        "answer:" * 25,
        "9^9^9^9",
        "a" * 100,
    ],
)
def test_hostile_answers_score_zero(answer):
    assert result(rf"\boxed{{{answer}}}")["score"] == 0
    assert result(f"#### {answer}")["score"] == 0


@pytest.mark.parametrize("truth", ["", "  ", None, True, "1" * 201, {"a": 1}])
def test_a_ground_truth_without_an_answer_is_an_error(truth):
    if truth is None or isinstance(truth, dict):
        truth = "" if truth is None else {"numbers": list(range(100))}
    with pytest.raises(DataError, match=r"m: ground_truth is .*; needed: a number, or a text"):
        compute_score("m", r"\boxed{1}", truth)
    with pytest.raises(DataError, match="m: solution_str is bytes"):
        compute_score("m", b"1", "1")


def test_a_computation_without_end_is_ended_and_the_next_answer_is_scored():
    function = GuardedFunction(
        f"pkg://{math_answer.__name__}", "compute_score", RewardGuardSettings(time_limit=5.0)
    )
    calls = [
        {"data_source": "m", "solution_str": rf"\boxed{{{text}}}", "ground_truth": "72"}
        for text in ("9!!!!!!", "72")
    ]
    try:
        (_, problem), (right, fine) = function.score(calls)
    finally:
        function.close()
    assert problem == "the reward did not return within 5 s"
    assert (right["score"], fine) == (1.0, "")
