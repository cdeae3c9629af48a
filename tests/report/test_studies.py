"""From made-up runs to the numbers, the table, the figures and the page."""

import json
import math
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab_results import made_up_result, made_up_results

from hpo_verl import cli
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.figures import draw_study
from hpo_verl.report.publish import comparisons, write_report
from hpo_verl.report.studies import Comparison, Regime, read_results, write_results

GAINS = {"a_hpo": 0.05, "grpo": 0.03, "dapo": -0.04}
LEVELS = (0.05, 0.1)
DIFFERENCE, BETTER = "area - grpo", "P(better area)"


def results_of(levels=LEVELS, gain=lambda cell: GAINS[cell["variant"]], **changes):
    return made_up_results("sparse", GAINS, gain, levels=levels, **changes)


def row_of(comparison, variant):
    rows = comparison.rows(next(iter(comparison.runs)))
    return next(row for row in rows if row["method"] == f"`{variant}`")


def test_rows_by_hand():
    comparison = Comparison("sparse", results_of())
    assert comparison.baseline == "grpo"
    assert list(comparison.runs) == [Regime("countdown3", 0.05), Regime("countdown3", 0.1)]
    # In the order of the study's file.
    assert comparison.variants == ["a_hpo", "grpo", "dapo"]
    a_hpo = row_of(comparison, "a_hpo")
    assert (a_hpo["runs"], a_hpo["collapsed"], a_hpo["responses"]) == (5, 0, 512)
    # Final success 0.3 + 0.01 seed; without the lowest and the highest of five: 0.32.
    assert a_hpo["final"].point == pytest.approx(0.32)
    # The area is the mean of a straight line: half-way.
    assert a_hpo["area"].point == pytest.approx(0.22)
    # Seed by seed the difference is 2 * 0.02, whatever the seed.
    assert tuple(a_hpo[DIFFERENCE]) == pytest.approx((0.04, 0.04, 0.04))
    assert a_hpo[BETTER].point == 1.0
    assert row_of(comparison, "grpo")[DIFFERENCE] is None
    # Success falls from 0.1 to -0.06: below half of what it began with in every seed.
    dapo = row_of(comparison, "dapo")
    assert dapo["collapsed"] == 5
    assert dapo[BETTER].point == 0.0


@pytest.mark.parametrize(("last", "count"), [(0.049, 1), (0.05, 0)])
def test_a_run_that_lost_half_of_its_success_has_collapsed(last, count):
    cell = results_of()[0].cell
    row = row_of(Comparison("sparse", [made_up_result(cell, [0.1, 0.2, last])]), cell["variant"])
    assert row["collapsed"] == count


def test_diverged_runs_are_counted_and_stay_in_every_number():
    results = [
        made_up_result(r.cell, [0.1, 0, 0, 0, 0], status="diverged")
        if (r.cell["variant"], r.cell["seed"]) == ("a_hpo", 0)
        else r
        for r in results_of()
    ]
    row = row_of(Comparison("sparse", results), "a_hpo")
    assert (row["runs"], row["collapsed"]) == (5, 1)
    assert row["final"].point == pytest.approx((0.31 + 0.32 + 0.33) / 3)


def test_seeds_that_only_one_method_has_are_not_paired():
    results = [r for r in results_of() if r.cell["variant"] != "a_hpo" or r.cell["seed"] >= 3]
    row = row_of(Comparison("sparse", results), "a_hpo")
    assert row["runs"] == 2
    assert row[DIFFERENCE].point == pytest.approx(0.04)
    # Areas of seeds 3 and 4 of both: 0.23, 0.24 against 0.19, 0.20.
    assert row[BETTER].point == 1.0


def test_each_method_gets_its_best_learning_rate_and_pays_with_seeds():
    best = {"a_hpo": 0.01, "grpo": 0.001, "dapo": 0.001}

    def gain(cell):
        chosen = cell["learning_rate"] == best[cell["variant"]]
        # What counts is the first two seeds; on the others the other rate would be better.
        good = chosen if cell["seed"] < 2 else not chosen
        return 0.05 if good else 0.01

    results = made_up_results("lr", GAINS, gain, levels=(0.05,), seeds=8, rates=(0.001, 0.01))
    comparison = Comparison("lr", results)
    assert comparison.tuned == {0, 1}
    assert comparison.rates == best
    (regime,) = comparison.runs
    runs = comparison.runs[regime]["a_hpo"]
    assert list(runs.index) == [2, 3, 4, 5, 6, 7]
    assert set(runs["learning_rate"]) == {0.01}


def test_the_report_says_what_was_measured(tmp_path, monkeypatch, capsys):
    write_results(tmp_path / "runs" / "all.parquet", results_of())
    out = tmp_path / "report"
    arguments = ["hpo-verl", "lab", "report", str(tmp_path / "runs"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert str(out / "report.md") in capsys.readouterr().out
    page = (out / "report.md").read_text()
    for text in ("0.040 [0.040, 0.040]", "### countdown3, warm start 5%", '"commit": "abc"'):
        assert text in page
    for level in LEVELS:
        name = f"pictures/sparse-countdown3-{level}-curves.svg"
        assert f"]({name})" in page
        assert (out / name).read_bytes().startswith(b"<?xml")


def test_without_the_baseline_there_are_no_differences(tmp_path):
    results = [r for r in results_of((0.05,)) if r.cell["variant"] != "grpo"]
    comparison = Comparison("sparse", results)
    assert all(row[DIFFERENCE] is None for row in comparison.rows(*comparison.runs))
    assert len(draw_study(comparison, tmp_path)) == 1


def test_a_folder_without_results_and_runs_that_differ_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no finished run"):
        write_report([tmp_path / "empty"], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    other = results_of(training={"prompts_per_step": 32})
    write_results(tmp_path / "a" / "1.parquet", results_of())
    write_results(tmp_path / "b" / "1.parquet", other)
    with pytest.raises(ConfigError, match=r"training\.prompts_per_step = 64 and 32"):
        comparisons([tmp_path / "a", tmp_path / "b"])


def test_results_come_back_as_they_were_written(tmp_path):
    results = results_of()
    results[0].rows.loc[1:2, "success"] = math.nan
    write_results(tmp_path / "all.parquet", results)
    again = read_results(tmp_path)
    for result, other in zip(results, again, strict=True):
        assert result.facts == other.facts
        for name in result.rows:
            np.testing.assert_array_equal(result.rows[name].astype("float32"), other.rows[name])
    # Step 2 was neither measured nor the first.
    assert list(again[0].thinned().rows["step"]) == [0.0, 1.0, 3.0, 4.0]
    (tmp_path / "all.parquet").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"all\.parquet: is no result of hpo-verl lab$"):
        read_results(tmp_path)
    metadata = {b"hpo_verl_lab": json.dumps({"shared": [], "cells": [{}]})}
    own = pa.table({"a": [1]}).replace_schema_metadata(metadata)
    pq.write_table(own, tmp_path / "all.parquet")
    with pytest.raises(DataError, match=r"all\.parquet: is no result of hpo-verl lab$"):
        read_results(tmp_path)


def test_the_table_of_a_whole_study_is_small(tmp_path):
    rng = np.random.default_rng(0)
    results = []
    for result in made_up_results("sparse", [f"v{i}" for i in range(14)], lambda cell: 0, seeds=10):
        success = rng.random(51)
        success[1::2] = math.nan
        results.append(made_up_result(result.cell, success.tolist()).thinned())
    write_results(tmp_path / "all.parquet", results)
    # 140 of a study's 720 runs; the repository's limit for the whole is 2 MB.
    assert (tmp_path / "all.parquet").stat().st_size < 400_000
