import math

import pytest

from hpo_verl.core.branching import branch_value, global_samples


@pytest.mark.parametrize(
    ("total", "root", "tools", "sensitivity", "samples"),
    [
        (16, 1.0, [1.0, 1.0], 1.0, 8),
        # sigmoid(ln 3) = 3/4, and sigmoid(-ln 3) = 1/4.
        (16, math.log(3), [0.0], 1.0, 12),
        (16, 0.0, [math.log(3)], 1.0, 4),
        # The mean of the tools' is 1: sigmoid(2 * ln 3 / 2).
        (16, 1.0 + math.log(3) / 2, [0.5, 1.5], 2.0, 12),
        (16, 5.0, [0.0], 0.0, 8),
        (16, 2.0, [], 1.0, 16),
        (1, 0.0, [5.0], 1.0, 1),
        # One at least, and no overflow.
        (8, 0.0, [1e6], 1.0, 1),
        (8, 1e6, [0.0], 1e6, 8),
    ],
)
def test_sessions_from_the_root_by_hand(total, root, tools, sensitivity, samples):
    assert global_samples(total, root, tools, sensitivity) == samples


@pytest.mark.parametrize(
    ("change", "in_a_row", "value"),
    [(0.0, 0, 0.5), (1.0, 0, 0.7), (-1.0, 0, 0.3), (1.0, 1, 0.525), (1.0, 2, 0.35), (9.0, 4, 0.0),
     (9.0, 7, 0.0)],
)  # fmt: skip
def test_the_value_of_a_branch_by_hand(change, in_a_row, value):
    found = branch_value(change, in_a_row, base=0.5, weight=0.2, penalty=0.25)
    assert found == pytest.approx(value, abs=1e-12)
