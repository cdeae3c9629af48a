"""Responses, ground truths and results of rewards, by the row of README.md that tells of each."""

from fractions import Fraction

import numpy as np
import pytest
from verl.trainer.ppo.metric_utils import process_validation_metrics

from hpo_verl.rewards import countdown, telelogs
from hpo_verl.rewards.scoring_process import checked_result

TRUTH = {"target": 10, "numbers": [1, 4, 6]}
RESPONSES = [
    (28, "<think>4*1+6=10</think> so 4*1+6", TRUTH, "no_answer"),
    (29, "<answer>81*1</answer>", {"target": 81, "numbers": [1, 81, 1, 1]}, "wrong_numbers"),
    (29, "<answer>15/2</answer>", {"target": 7, "numbers": [15, 2]}, "wrong_value"),
    (30, "<answer>4+6</answer>", {"target": 10, "numbers": [1, 9]}, "wrong_numbers"),
    (31, f"<answer>{'+'.join('1' * 15)}</answer>", {"target": 15, "numbers": [1] * 15}, "correct"),
]


@pytest.mark.parametrize(("row", "response", "truth", "reason"), RESPONSES)
def test_responses(row, response, truth, reason):
    result = countdown.compute_score("countdown", response, truth)
    assert result["reason"] == reason
    assert (result["score"] == 1) == (reason == "correct")


@pytest.mark.parametrize("response", ["<answer>__import__('os')</answer>", "<answer>2**9</answer>"])
def test_what_is_no_arithmetic_is_not_calculated(response):
    """Row 74."""
    assert countdown.compute_score("countdown", response, TRUTH)["score"] < 1


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "1", [1.0], {"score": None}])
def test_results_that_are_no_number(value):
    """Row 25."""
    with pytest.raises((TypeError, ValueError)):
        checked_result(value)


def test_a_dict_without_the_score():
    """Row 27."""
    with pytest.raises(ValueError, match="no key 'score'"):
        checked_result({"reward": 1})


NUMBERS = [
    *(1, True, np.float16(1), np.float32(1), np.float64(1), np.int64(1), np.bool_(True)),
    Fraction(1),
]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: type(value).__name__)
def test_numbers_of_numpy(value):
    """Row 77."""
    assert checked_result(value) == {"acc": 1.0}
    assert type(checked_result(value)["acc"]) is float
    found = checked_result({"score": value, "further": value})
    assert found == {"score": 1.0, "further": 1.0}
    assert {type(entry) for entry in found.values()} == {float}


class Word(str):
    """A text of the user's own class, which another process does not know."""


@pytest.mark.parametrize("value", [None, "a", Word("a"), np.str_("a")])
def test_further_keys_that_verl_leaves_out(value):
    """Row 23."""
    found = checked_result({"score": 1, "pred": value})["pred"]
    assert found == value
    assert type(found) in (str, type(None))


class Unsent:
    """What verl could not send either."""

    def __reduce__(self):
        raise TypeError


LISTS = [[1], (1, 2.5), [[1, 2], [3, 4]], np.array(1), np.array([1, 2])]
NO_MEAN = [
    *({"a": 1}, b"a", object(), Unsent(), 1j, [], ["a"], [None], [[1], [2, 3]], [[1], 2]),
    *([{}], np.array(["a"]), np.array([])),
]


def verl_takes(value, responses):
    """Whether verl's validation works with it under a further key."""
    infos = {"score": [1.0] * responses, "x": [value] * responses}
    try:
        with np.errstate(all="ignore"):
            found = process_validation_metrics(["s"] * responses, ["u"] * responses, infos)
    except (TypeError, ValueError):
        return False
    return not np.isnan(found["s"]["x"][f"mean@{responses}"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", LISTS, ids=repr)
def test_further_keys_with_lists(value):
    """Row 24."""
    found = checked_result({"score": 1, "x": value})["x"]
    assert np.array_equal(found, value)
    assert verl_takes(found, responses=1)
    assert verl_takes(found, responses=2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", NO_MEAN, ids=lambda value: type(value).__name__)
def test_further_keys_that_have_no_mean(value):
    """Row 24."""
    with pytest.raises(TypeError, match=r"the reward's 'x' is (of type|a list)"):
        checked_result({"score": 1, "x": value})
    assert not verl_takes(value, responses=2)


@pytest.mark.parametrize("box", ["C3", " C3 ", "\\text{C3}"])
def test_boxes(box):
    """Row 78."""
    assert telelogs.compute_score("telelogs", f"\\boxed{{{box}}}", "C3")["score"] == 1
