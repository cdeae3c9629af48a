"""Responses dealt by value: numbers by hand, and the optimum by dynamic programming."""

import math
import random

import pytest

from hpo_verl.core.allocation import allocate, group_value
from hpo_verl.errors import DataError


def best_by_dynamic_programming(rates, budget, least, most):
    """Largest sum of values over all numbers of responses that use the budget."""
    best = {0: 0.0}
    for rate in rates:
        longer = {}
        for used, value in best.items():
            for responses in range(least, most + 1):
                total = used + responses
                if total <= budget:
                    found = value + group_value(responses, rate)
                    longer[total] = max(longer.get(total, -math.inf), found)
        best = longer
    return best[budget]


def test_the_value_by_hand():
    # (1 - 1/4 - 1/4) / 8, and (1 - 1/16 - 9/16) * 1/4 * 9/16
    assert group_value(2, 0.5) == 0.0625
    assert group_value(2, 0.25) == pytest.approx(0.375 * 9 / 64, rel=1e-15)
    for rate in (0.0, 0.3, 1.0):
        assert group_value(1, rate) == pytest.approx(0.0, abs=1e-15)
    assert group_value(9, 0.0) == group_value(9, 1.0) == 0.0


def test_by_hand():
    # To p = 1/2 the third response adds 1/8 (1/8 + 1/8) = 1/32, the others 1/64, 1/128, ...;
    # to p = 3/4 the third 3/64 (9/64 + 3/64) = 9/1024, the fourth 3/64 (27 + 3)/256 = 0.0055.
    assert allocate([0.5, 0.75], 3, 2, 9) == (4, 2)
    assert allocate([0.5, 0.75], 4, 2, 9) == (5, 3)
    assert allocate([0.5, 0.75], 4, 2, 4) == (4, 4)


def test_prompts_without_a_rate_get_the_mean():
    assert allocate([None] * 3, 8, 2, 128) == (8, 8, 8)
    assert allocate([None, 0.5, 1.0, None], 8, 2, 128) == (8, 14, 2, 8)


def test_what_is_left_goes_to_the_hopeless_first_and_evenly():
    # No group is worth anything.
    assert allocate([1.0, 0.0, 1.0, 0.0], 4, 2, 8) == (2, 6, 2, 6)
    assert allocate([1.0, 0.0, 1.0], 4, 2, 5) == (4, 5, 3)
    assert allocate([1.0, 1.0], 4, 2, 8) == (4, 4)
    # The one that is worth something is full.
    assert allocate([0.5, 0.0, 1.0], 6, 2, 8) == (8, 8, 2)


def test_bounds_that_leave_no_choice():
    assert allocate([0.5, 0.1, 1.0], 4, 4, 4) == (4, 4, 4)
    assert allocate([], 4, 2, 8) == ()


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_optimum(seed):
    draw = random.Random(seed)
    least, prompts = draw.randint(2, 3), draw.randint(1, 6)
    most = least + draw.randint(1, 12)
    uniform = draw.randint(least, most)
    steps = draw.choice([8, 7, 1000])
    rates = [draw.randint(0, steps) / steps for _ in range(prompts)]
    dealt = allocate(rates, uniform, least, most)
    assert sum(dealt) == uniform * prompts
    assert all(least <= responses <= most for responses in dealt)
    value = sum(map(group_value, dealt, rates))
    best = best_by_dynamic_programming(rates, uniform * prompts, least, most)
    assert value == pytest.approx(best, rel=1e-12, abs=1e-15)


def test_one_prompt_gets_most_of_a_large_budget():
    """As in the paper's figure: up to 93 responses, in a batch that is mostly too easy."""
    dealt = allocate([0.05] + [1.0] * 15, 8, 2, 128)
    assert dealt == (98,) + (2,) * 15


def test_a_rate_out_of_range_is_refused():
    with pytest.raises(DataError, match=r"^success rate 1\.5 of prompt 1: must be in \[0, 1\]$"):
        allocate([None, 1.5], 4, 2, 8)
