"""Finished runs come back from their files, and a study's runs are sorted by regime and variant."""

import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab_results import made_up_cells, made_up_result, made_up_results

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.comparison import Comparison, reduced
from hpo_verl.report.regimes import read_plan
from hpo_verl.report.studies import (
    area_of,
    best_rate,
    merged,
    read_results,
    require_same_settings,
    write_results,
)

GAINS = {"grpo": 0.03, "hysteretic_grpo": 0.06, "a_hpo": 0.05, "mean_length": 0.01}


def gain(cell):
    return GAINS[cell["variant"]]


def compared(study, results):
    return Comparison(read_plan(study), results)


def one_cell(study="lag", variant="grpo", **changes):
    return next(made_up_cells(study, [variant], **changes))


def test_results_come_back_as_they_were_written(tmp_path):
    results = made_up_results("sparsity", gain, seeds=range(2), warm_start=[0.05])
    results[0].rows["pass@1"] = [0.1, math.nan, math.nan, math.nan, 0.4]
    write_results(tmp_path / "all.parquet", results)
    again = read_results(tmp_path)
    for result, other in zip(results, again, strict=True):
        assert result.facts == other.facts
        for name in result.rows:
            np.testing.assert_array_equal(result.rows[name].astype("float32"), other.rows[name])
    # Whoever opens the file without this package finds the regime there.
    table = pd.read_parquet(tmp_path / "all.parquet")
    assert set(table["wrong_length"].dropna()) == {4.0}
    assert set(table["variant"]) == set(GAINS)


def test_what_is_no_result_is_named(tmp_path):
    path = tmp_path / "all.parquet"
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"all\.parquet: is no result of hpo-verl lab$"):
        read_results(tmp_path)
    metadata = {b"hpo_verl_lab": json.dumps({"shared": [], "runs": [{}]})}
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match=r"all\.parquet: is no result of hpo-verl lab$"):
        read_results(tmp_path)


def test_measured_dissected_and_first_steps_are_kept():
    cell = one_cell()
    result = made_up_result(cell, [0.1, math.nan, math.nan, math.nan, math.nan, 0.3])
    assert list(result.thinned().rows["step"]) == [0, 1, 5]
    result.rows["positive_gradient_norm"] = [math.nan, 1.0, math.nan, 2.0, math.nan, math.nan]
    assert list(result.thinned().rows["step"]) == [0, 1, 3, 5]


def test_a_new_run_replaces_the_one_of_the_same_identity():
    old, new = (
        made_up_results("lag", lambda cell, g=g: g, ["grpo"], range(2)) for g in (0.01, 0.02)
    )
    # Three regimes of two seeds; of the new ones only the last regime's.
    found = merged(old, new[-1:])
    assert len(found) == len(old) == 6
    assert [area_of(result) for result in found[:-1]] == [area_of(result) for result in old[:-1]]
    assert area_of(found[-1]) == area_of(new[-1]) != area_of(old[-1])
    assert len(merged(old, made_up_results("lag", gain, ["a_hpo"], range(2)))) == 12


def test_a_run_is_reduced_by_hand():
    curve = [0.1, 0.5, 0.9, 0.3, 0.2]
    cell = one_cell("sparsity", warm_start=[0.05], wrong_length=[4])
    result = made_up_result(cell, curve, **{"pass@64": [0.2, *3 * [math.nan], 0.7]})
    found = reduced(result)
    assert (found["first"], found["early"], found["final"], found["best"]) == (0.1, 0.5, 0.2, 0.9)
    # Trapezoids 0.3 + 0.7 + 0.6 + 0.25 over four steps.
    assert found["area"] == area_of(result) == pytest.approx(1.85 / 4)
    assert found["collapsed"]
    assert found["responses"] == 512
    # Right answers have 10 tokens, wrong ones 0.9 * 4 times as many.
    assert found["length_ratio"] == pytest.approx(3.6)
    # Only the last of four steps lies in the last tenth.
    assert found["entropy"] == pytest.approx(0.9)
    assert (found["pass@64"], found["pass@64 before"]) == (0.7, 0.2)


def test_a_diverged_run_has_collapsed_and_counts_with_its_zeros():
    curve = [0.1, 0.0, 0.0, 0.0, 0.0]
    result = made_up_result(one_cell(), curve, status="diverged")
    result.rows.loc[1:, ["entropy", "responses_sampled", "response_length_right"]] = math.nan
    found = reduced(result)
    assert found["collapsed"]
    assert found["area"] == pytest.approx(0.05 / 4)
    assert math.isnan(found["entropy"])
    assert math.isnan(found["length_ratio"])


def test_regimes_are_those_of_the_plan_and_then_others():
    results = made_up_results("lag", gain, seeds=range(3), **{"training.lag": [2, 4]})
    comparison = compared("lag", results)
    assert [comparison.title(regime) for regime in comparison.regimes] == [
        f"sampled by a policy {lag} steps old" for lag in (1, 4, 16, 2)
    ]
    assert [dict(regime)["training.lag"] for regime in comparison.runs] == [4, 2]
    first, second, third, _ = comparison.regimes
    assert comparison.lacking(first) == list(comparison.plan.variants)
    assert comparison.lacking(second) == []
    found = comparison.effect(second, "a_hpo", "grpo")
    # Success rises by 0.02 more per step, so that the area is 0.04 larger.
    assert found.pairs == 3
    assert tuple(found.difference) == pytest.approx((0.04, 0.04, 0.04))
    assert comparison.effect(third, "a_hpo", "grpo") == (0, None)


def test_only_seeds_that_both_have_are_paired():
    results = made_up_results("lag", gain, ["grpo"], range(4), **{"training.lag": [4]})
    results += made_up_results("lag", gain, ["a_hpo"], range(2, 9), **{"training.lag": [4]})
    comparison = compared("lag", results)
    (regime,) = comparison.runs
    assert comparison.effect(regime, "a_hpo", "grpo").pairs == 2


@pytest.mark.parametrize(
    ("first", "others", "own", "pairs"),
    [
        (0.125, {}, {}, 4),
        (0.25, {}, {"warm_start_success": 0.125}, 3),
        (0.125, {}, {"warm_start_success": 0.25}, 3),
        # The digest tells, whatever the success.
        (0.125, {"began_with": "one"}, {"began_with": "other"}, 3),
        (0.25, {"began_with": "one"}, {"began_with": "one"}, 4),
        # Nobody knows with what an older run began.
        (0.125, {"began_with": "one"}, {}, 3),
    ],
)
def test_runs_that_began_with_other_policies_are_no_pair(first, others, own, pairs):
    """Another machine's warm start of the same seed is another policy."""

    def made(cell):
        rise = 0.75 if cell["variant"] == "a_hpo" else 0.5
        if (cell["variant"], cell["seed"]) != ("a_hpo", 1):
            result = made_up_result(cell, [0.125, 0.5, rise])
            return result._replace(facts=result.facts | others)
        result = made_up_result(cell, [first, 0.5, rise])
        return result._replace(facts=result.facts | own)

    cells = made_up_cells("lag", ["grpo", "a_hpo"], range(4), **{"training.lag": [4]})
    comparison = Comparison(read_plan("lag"), [made(cell) for cell in cells])
    [regime] = comparison.runs
    found = comparison.effect(regime, "a_hpo", "grpo", "final")
    assert found.pairs == pairs
    assert found.difference is not None
    assert found.difference.point == 0.25


def test_runs_that_were_measured_differently_are_refused():
    results = made_up_results("lag", gain, ["grpo"], range(1))
    results += made_up_results("lag", gain, ["a_hpo"], range(1), **{"evaluation.every": 5})
    with pytest.raises(ConfigError, match="study lag: holds runs of one regime with evaluation"):
        compared("lag", results)


def test_a_folder_of_runs_that_were_measured_differently_is_refused(tmp_path):
    alike = {"evaluation.every": 3}
    cells = [one_cell(**alike), one_cell(variant="a_hpo", **alike)]
    cells.append(one_cell(**alike, **{"training.steps": 9}))
    require_same_settings(tmp_path, cells)
    with pytest.raises(ConfigError, match=r"evaluation\.every = 3 and 5, which cannot be compared"):
        require_same_settings(tmp_path, [*cells, one_cell(**{"evaluation.every": 5})])


def test_a_variant_that_changed_its_meaning_is_refused():
    results = made_up_results("lag", gain, ["a_hpo"], range(2))
    results[-1].cell["settings"] = {"algorithm.hpo.ema": 0.9}
    with pytest.raises(ConfigError, match="runs of a_hpo with variants"):
        compared("lag", results)


def test_the_best_rate_has_the_largest_mean_area_and_of_equal_ones_the_smallest():
    assert best_rate({1e-3: [0.2, 0.4], 1e-4: [0.5, 0.0], 1e-2: [0.3]}) == 1e-3
    assert best_rate({1e-2: [0.3, 0.3], 1e-3: [0.4, 0.2], 1e-4: [0.1, 0.1]}) == 1e-3


def tuned_results():
    """Four seeds try every rate; six more are trained at what was best then, and lose there."""
    best = {"grpo": 1e-3, "a_hpo": 3e-4}

    def at(cell):
        good = cell["training"]["learning_rate"] == best[cell["variant"]]
        return 0.05 if good else 0.01

    results = made_up_results("tuned", at, list(best), range(4))
    for name, rate in best.items():
        results += made_up_results(
            "tuned", lambda cell: 0.0, [name], range(4, 10), **{"training.learning_rate": [rate]}
        )
    return best, results


def test_each_method_gets_its_best_rate_and_the_seeds_that_chose_it_are_not_compared():
    best, results = tuned_results()
    comparison = compared("tuned", results)
    (regime,) = comparison.regimes
    assert "training.learning_rate" not in dict(regime)
    assert {name: comparison.rates[regime, name] for name in best} == best
    for name in best:
        assert list(comparison.runs[regime][name].index) == [4, 5, 6, 7, 8, 9]
        assert set(comparison.runs[regime][name]["rate"]) == {best[name]}
    assert comparison.effect(regime, "a_hpo", "grpo").pairs == 6


def test_a_seed_is_set_aside_by_what_its_runs_say_and_not_by_the_plan():
    best, results = tuned_results()
    for result in results:
        result.facts["tuning"] |= result.cell["seed"] == 4
    comparison = compared("tuned", results)
    (regime,) = comparison.regimes
    for name in best:
        assert list(comparison.runs[regime][name].index) == [5, 6, 7, 8, 9]


def test_a_study_without_runs_has_its_plan():
    comparison = compared("sparsity", [])
    assert tuple(comparison.regimes) == comparison.plan.regimes
    assert comparison.runs == {}
    assert comparison.variants == ["grpo", "hysteretic_grpo", "a_hpo", "mean_length"]


def test_a_whole_study_makes_a_small_file(tmp_path):
    rng = np.random.default_rng(0)
    results = []
    for cell in made_up_cells("sparsity", seeds=range(10), warm_start=[0.01, 0.05]):
        success = rng.random(51)
        success[1::2] = math.nan
        result = made_up_result(cell, success.tolist())
        for name in ("entropy", "alpha", "solve_rate", "response_length"):
            result.rows[name] = rng.random(51)
        results.append(result.thinned())
    write_results(tmp_path / "all.parquet", results)
    # 160 runs; some 2 KB a run.
    assert (tmp_path / "all.parquet").stat().st_size < 320_000
