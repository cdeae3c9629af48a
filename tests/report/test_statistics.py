"""Statistics: numbers by hand, and scipy's own bootstrap."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from hpo_verl.report.statistics import (
    RESAMPLES,
    Interval,
    effect,
    has_collapsed,
    interquartile_mean,
    interval,
    measures,
    summary,
)


def test_measures_by_hand():
    # Success 0.1, 0.3, 0.3, 0.7 after 0, 10, 20, 40 steps.
    found = measures([0, 10, 20, 40], [0.1, 0.3, 0.3, 0.7])
    assert found["final"] == 0.7
    # Trapezoids 2 + 3 + 10 = 15 over a budget of 40.
    assert found["area"] == pytest.approx(15 / 40)
    # 25 %: step 10.
    assert found["early"] == pytest.approx(0.3)
    assert found["best"] == 0.7
    assert measures([0, 4, 8], [0.0, 0.4, 0.2])["early"] == pytest.approx(0.2)


def test_final_is_the_mean_over_the_last_tenth():
    steps = list(range(0, 101, 5))
    success = [0.0] * 19 + [0.2, 0.4]
    assert measures(steps, success)["final"] == pytest.approx(0.3)


def test_the_interquartile_mean_by_hand():
    # Eight values: the two lowest and the two highest go.
    assert interquartile_mean([100, 1, 2, 3, 4, 5, -100, 6]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    # Ten values: 0.25 * 10 rounds down to two on each side.
    assert interquartile_mean(np.arange(10.0)) == pytest.approx(4.5)
    assert interquartile_mean([1.0, 5.0]) == 3.0


def test_one_regime_is_scipys_bootstrap():
    values = np.random.default_rng(1).normal(size=10)
    found = interval(values)
    expected = stats.bootstrap(
        (values,), lambda x, axis: stats.trim_mean(x, 0.25, axis=axis), n_resamples=RESAMPLES,
        method="percentile", vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert found.point == pytest.approx(stats.trim_mean(values, 0.25))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    # And close to the same bootstrap written out.
    rng = np.random.default_rng(2)
    draws = [stats.trim_mean(rng.choice(values, 10), 0.25) for _ in range(4000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.06)
    assert found.high == pytest.approx(high, abs=0.06)


@pytest.mark.parametrize(
    ("final", "best", "lost"),
    [
        (0.2, 0.41, True),  # below half of 0.41
        (0.205, 0.41, False),  # exactly half
        (0.0, 0.05, False),  # all of it, but no more than five percentage points
        (0.0, 0.06, True),
    ],
)
def test_a_run_that_lost_half_of_its_best_and_five_points_has_collapsed(final, best, lost):
    assert has_collapsed(final, best) is lost


def test_an_effect_is_taken_seed_by_seed():
    # Seed 3 is one method's alone, and seed 4 was not measured for it.
    ours = {0: 0.5, 1: 0.6, 2: 0.9, 3: 0.7, 4: math.nan}
    theirs = {4: 0.1, 2: 0.3, 1: 0.4, 0: 0.2}
    found = effect(ours, theirs)
    assert found.pairs == 3
    # Differences 0.3, 0.2, 0.6: of three none is cut.
    assert found.difference.point == pytest.approx(1.1 / 3)
    assert (found.better, found.worse) == (True, False)
    assert effect(theirs, ours).worse


def test_too_few_pairs_decide_nothing():
    found = effect({0: 1.0, 1: 1.0}, {0: 0.0, 1: 0.0})
    assert (found.pairs, found.better, found.worse) == (2, False, False)
    assert found.difference.point == 1.0
    assert effect({0: 1.0}, {1: 0.0}) == (0, None)


def test_a_summary_leaves_out_what_was_not_measured():
    assert summary([math.nan, 0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)
    assert summary([math.nan]) is None


def test_coverage_of_the_interval_of_a_mean_of_many_runs():
    # Central interval of normal data: it holds the true mean about 95 times in 100.
    rng = np.random.default_rng(4)
    hits = 0
    for trial in range(60):
        found = interval(rng.normal(size=30), seed=trial)
        hits += found.low <= 0.0 <= found.high
    assert hits >= 50


def test_the_interval_of_three_runs_is_that_of_all_resamples():
    values = (0.1, 0.2, 0.6)
    means = [sum(draw) / 3 for draw in itertools.product(values, repeat=3)]
    exact = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    found = interval(values)
    assert found.point == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx(tuple(exact), abs=1e-12)
    assert interval([0.5] * 5) == (0.5, 0.5, 0.5)


def test_two_runs_have_a_point_and_no_interval():
    found = interval([0.3, 0.5])
    assert found.point == pytest.approx(0.4)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(interval([0.1, 0.2]).low)


def test_intervals_as_text():
    assert Interval(0.25, 0.2, 0.3).shown(".1%") == "25.0% [20.0%, 30.0%]"
    assert Interval(0.25, math.nan, math.nan).shown(".2f") == "0.25"


def test_bands_of_curves_by_hand():
    point, low, high = interval([[0.0, 0.2], [0.0, 0.4], [0.0, 0.6], [0.0, 0.8]], axis=0)
    assert point == pytest.approx([0.0, 0.5])
    assert (low[0], high[0]) == (0.0, 0.0)
    assert low[1] < 0.5 < high[1]
    _, low, _ = interval([[0.1, 0.2]], axis=0)
    assert np.isnan(low).all()
