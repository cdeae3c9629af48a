import pytest
import torch

from hpo_verl.core.rewards import successes
from hpo_verl.errors import DataError


def found(rewards, live=None):
    live = [True] * len(rewards) if live is None else live
    return successes(torch.tensor(rewards), torch.tensor(live, dtype=torch.bool)).tolist()


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 0.0, 1.0], [True, False, True]),
        ([1.0, -1.0, -1.0], [True, False, False]),
        ([1.0, 1.0], [True, True]),
        ([0.0, 0.0], [False, False]),
        ([-1.0], [False]),
        ([], []),
    ],
)
def test_two_values(rewards, expected):
    assert found(rewards) == expected


@pytest.mark.parametrize("other", [0.5, 1.5, 2.0, -2.0, 1e-7, 1 - 1e-7])
def test_another_value_is_refused_with_its_place(other):
    with pytest.raises(DataError, match=rf"^reward {other:g} of response 2: rewards must be 1 and"):
        found([1.0, 0.0, other])


def test_three_values_are_refused():
    with pytest.raises(DataError, match=r"^reward 0 of response 1: .* 1 and 0, or 1 and -1$"):
        found([1.0, 0.0, -1.0])


@pytest.mark.parametrize("dead", [0.5, -1.0, 1.0, float("nan")])
def test_rows_that_are_not_live_are_neither_read_nor_successes(dead):
    assert found([1.0, 0.0, dead], [True, True, False]) == [True, False, False]
