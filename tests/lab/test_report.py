"""From made-up runs to the tables, the pictures and the page."""

import dataclasses
import math
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from lab_policies import made_up_result
from scipy import stats

from hpo_verl import cli
from hpo_verl.errors import ConfigError
from hpo_verl.lab import pictures as pictures_module
from hpo_verl.lab.comparison import Comparison, Regime
from hpo_verl.lab.page import write_report
from hpo_verl.lab.pictures import DARK, draw_all
from hpo_verl.lab.results import long_table, read_long_table, thinned, write_result
from hpo_verl.lab.settings import read_study
from hpo_verl.lab.trainer import Outcome

STEPS = 4
SEEDS = 5


def curve(seed, gain):
    """Success rises by `gain` per step from 0.1, and differs by seed."""
    return [0.1 + 0.01 * seed + gain * step for step in range(STEPS + 1)]


def study_of(name="sparse", *overrides):
    return read_study(name, [f"seeds={SEEDS}", f"training.steps={STEPS}", *overrides])


GAINS = {"a_hpo": 0.05, "grpo": 0.03, "dapo": -0.04}


def results_of(study, gain=lambda cell: GAINS[cell.variant], **changes):
    return [
        made_up_result(dataclasses.asdict(cell), curve(cell.seed, gain(cell)), **changes)
        for cell in study.cells()
        if cell.variant in GAINS
    ]


@pytest.fixture
def study():
    return study_of("sparse", "tasks=[countdown3]", "warm_starts=[0.05,0.1]")


def test_rows_by_hand(study):
    comparison = Comparison("sparse", results_of(study), list(study.variants))
    assert comparison.regimes == [Regime("countdown3", 0.05), Regime("countdown3", 0.1)]
    assert comparison.variants == ["a_hpo", "grpo", "dapo"]
    rows = {row.variant: row for row in comparison.rows(comparison.regimes[:1])}
    a_hpo = rows["a_hpo"]
    assert (a_hpo.runs, a_hpo.collapses, a_hpo.responses) == (5, 0, 512.0)
    # Final success 0.3 + 0.01 seed; without the lowest and the highest of five: 0.32.
    assert a_hpo.measures["final"].point == pytest.approx(0.32)
    finals = [0.3 + 0.01 * seed for seed in range(5)]
    assert a_hpo.measures["final"].point == pytest.approx(stats.trim_mean(finals, 0.25))
    # The area is the mean of a straight line: half-way.
    assert a_hpo.measures["area"].point == pytest.approx(0.22)
    # Seed by seed the difference is 4 * 0.02, whatever the seed.
    assert tuple(a_hpo.differences["final"]) == pytest.approx((0.08, 0.08, 0.08))
    assert a_hpo.improvement["final"].point == 1.0
    assert rows["grpo"].differences == {}
    # Success falls from 0.1 to -0.06: below half of what it began with in every seed.
    assert rows["dapo"].collapses == 5
    assert rows["dapo"].improvement["area"].point == 0.0
    # Twice the warm start's 0.05 is there from the beginning.
    assert a_hpo.reached == 5
    assert a_hpo.measures["steps_to_threshold"].point == 0.0
    pooled = {row.variant: row for row in comparison.rows(comparison.regimes)}
    assert pooled["a_hpo"].runs == 10
    assert tuple(pooled["a_hpo"].differences["area"]) == pytest.approx((0.04, 0.04, 0.04))


def test_diverged_runs_are_counted_and_stay_in_every_number(study):
    results = results_of(study)
    lost = [r for r in results if r.cell["variant"] == "a_hpo" and r.cell["seed"] == 0]
    changed = [
        made_up_result(r.cell, [0.1, 0, 0, 0, 0], status="diverged") if r in lost else r
        for r in results
    ]
    comparison = Comparison("sparse", changed)
    row = next(r for r in comparison.rows(comparison.regimes[:1]) if r.variant == "a_hpo")
    assert (row.runs, row.collapses) == (5, 1)
    assert row.measures["final"].point == pytest.approx((0.31 + 0.32 + 0.33) / 3)


def test_seeds_that_only_one_method_has_are_not_paired(study):
    results = [
        r for r in results_of(study) if not (r.cell["variant"] == "a_hpo" and r.cell["seed"] < 3)
    ]
    comparison = Comparison("sparse", results)
    row = next(r for r in comparison.rows(comparison.regimes[:1]) if r.variant == "a_hpo")
    assert row.runs == 2
    assert row.differences["final"].point == pytest.approx(0.08)
    # Seeds 3 and 4 of both: 0.33, 0.34 against 0.25, 0.26.
    assert row.improvement["final"].point == 1.0


def test_each_method_gets_its_best_learning_rate_and_pays_with_seeds():
    study = study_of("lr", "seeds=8", "learning_rates=[0.001,0.01]")
    best = {"a_hpo": 0.01, "grpo": 0.001, "dapo": 0.001}

    def gain(cell):
        chosen = cell.learning_rate == best[cell.variant]
        # What counts is the first two seeds; on the others the other rate would be better.
        good = chosen if cell.seed < 2 else not chosen
        return 0.05 if good else 0.01

    comparison = Comparison("lr", results_of(study, gain))
    assert comparison.tuned == {0, 1}
    assert comparison.rates == best
    runs = comparison.runs(comparison.regimes[0], "a_hpo")
    assert [run.seed for run in runs] == [2, 3, 4, 5, 6, 7]
    assert {run.result.cell["learning_rate"] for run in runs} == {0.01}


def write_all(study, folder, results):
    names = {cell.name: cell for cell in study.cells()}
    by_key = {(c.task, c.warm_start, c.variant, c.seed): c for c in names.values()}
    for result in results:
        cell = result.cell
        key = (cell["task"], cell["warm_start"], cell["variant"], cell["seed"])
        length = len(result.columns["step"])
        rows = [{k: v[i] for k, v in result.columns.items()} for i in range(length)]
        facts = {k: v for k, v in result.facts.items() if k not in ("cell", "environment")}
        write_result(folder, by_key[key], Outcome(rows, facts))


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "srcset", "href") and v]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_says_what_was_measured(tmp_path, monkeypatch, capsys):
    study = study_of("sparse", "tasks=[countdown3]", "warm_starts=[0.05]")
    write_all(study, tmp_path / "runs", results_of(study))
    out = str(tmp_path / "report")
    arguments = ["hpo-verl", "lab", "report", str(tmp_path / "runs"), "--out", out]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    path = tmp_path / "report" / "index.html"
    assert str(path) in capsys.readouterr().out
    page = Page()
    page.feed(path.read_text())
    inside = [link for link in page.links if not link.startswith("https://arxiv.org/")]
    assert inside
    assert all(link.startswith("data:image/svg+xml;base64,") for link in inside)
    assert "script" not in page.tags
    for text in ("0.080 [0.080, 0.080]", "5/5", "countdown3, warm start 5%", "Collapsed", "seeds"):
        assert text in page.text
    pictures = {p.name for p in (tmp_path / "report" / "pictures").iterdir()}
    for stem in ("curves", "intervals", "batches", "alpha"):
        for theme in ("light", "dark"):
            for kind in ("svg", "png"):
                assert f"sparse-countdown3-0.05-{stem}-{theme}.{kind}" in pictures
    assert "sparse-differences-light.svg" in pictures
    # The report can be made again from its own table, as the repository does.
    again = write_report([tmp_path / "report" / "results.parquet"], tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


def test_the_ablation_of_alpha_is_drawn(tmp_path, monkeypatch):
    names = ("a_hpo", "alpha_0.0", "alpha_0.4", "alpha_1.0")
    results = [
        made_up_result(dataclasses.asdict(cell), curve(cell.seed, 0.03))
        for cell in study_of("alpha").cells()
        if cell.variant in names
    ]
    monkeypatch.setattr(pictures_module, "THEMES", (DARK,))
    pictures = {picture.name for picture in draw_all(Comparison("alpha", results), tmp_path)}
    assert "alpha-countdown3-0.05-ablation" in pictures
    # Without the baseline there are no differences to draw.
    assert "alpha-differences" not in pictures


def test_a_folder_without_results_and_runs_that_differ_are_refused(study, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no finished run"):
        write_report([tmp_path / "empty"], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    other = study_of("sparse", "tasks=[countdown3]", "training.prompts_per_step=32")
    write_all(study, tmp_path / "a", results_of(study))
    write_all(other, tmp_path / "b", results_of(other))
    with pytest.raises(ConfigError, match=r"training\.prompts_per_step = 64 and 32"):
        write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report")


def test_a_long_table_keeps_what_was_measured_and_the_first_step(study, tmp_path):
    results = results_of(study)
    results[0].columns["success"][1:3] = [math.nan, math.nan]
    pq.write_table(long_table([thinned(r) for r in results]), tmp_path / "all.parquet")
    again = read_long_table(tmp_path / "all.parquet")
    # Step 2 was neither measured nor the first.
    assert again[0].columns["step"] == [0.0, 1.0, 3.0, 4.0]
    assert again[1].columns["step"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    for result, other in zip(results, again, strict=True):
        assert result.facts == other.facts
        rows = [int(step) for step in other.columns["step"]]
        for name, values in result.columns.items():
            expected = np.asarray(values, dtype=np.float32)[rows]
            np.testing.assert_array_equal(expected, np.asarray(other.columns[name], np.float32))


def test_the_table_of_a_whole_study_is_small(tmp_path):
    study = read_study("sparse", ["seeds=2"])
    steps = range(study.training.steps + 1)
    rng = np.random.default_rng(0)

    def made_up(cell):
        result = made_up_result(dataclasses.asdict(cell), rng.random(len(steps)).tolist())
        result.columns["success"] = [
            v if s % study.evaluation.every == 0 else math.nan
            for s, v in zip(steps, result.columns["success"], strict=True)
        ]
        return result

    results = [made_up(cell) for cell in study.cells()]
    pq.write_table(long_table([thinned(result) for result in results]), tmp_path / "all.parquet")
    # 144 of its 720 cells; the repository's limit for the whole is 2 MB.
    assert (tmp_path / "all.parquet").stat().st_size < 400_000
