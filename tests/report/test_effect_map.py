"""The map: every planned point has its effect, or a mark that says that it was not run."""

import pytest
from lab_results import made_up_results

from hpo_verl.report.comparison import Comparison
from hpo_verl.report.effect_map import (
    caption,
    draw_map,
    length_points,
    length_ratio,
    methods,
    sparsity_points,
)
from hpo_verl.report.regimes import read_plan

GAINS = {"grpo": 0.03, "hysteretic_grpo": 0.06, "a_hpo": 0.05, "mean_length": 0.01}
METHODS = ["hysteretic_grpo", "a_hpo", "mean_length"]


def compared(study, results):
    return Comparison(read_plan(study), results)


def results_of(study, variants=tuple(GAINS), seeds=3, **changes):
    return made_up_results(
        study, lambda cell: GAINS[cell["variant"]], variants, range(seeds), **changes
    )


def test_points_by_hand():
    study = compared("sparsity", results_of("sparsity", warm_start=[0.05], wrong_length=[4]))
    assert methods(study) == METHODS
    points = sparsity_points(study)
    assert len(points) == len(METHODS) * len(study.plan.regimes)
    assert {point.x for point in points} == {
        dict(regime)["warm_start"] for regime in study.plan.regimes
    }
    found = [point for point in points if point.effect.pairs]
    assert [(point.panel, point.x, point.method) for point in found] == [
        ("wrong answers 4 x right ones", 0.05, method) for method in METHODS
    ]
    for point, difference in zip(found, (0.06, 0.04, -0.04), strict=True):
        assert tuple(point.effect.difference) == pytest.approx([difference] * 3)


def test_a_ratio_is_measured_or_else_the_one_that_is_asked_for():
    study = compared("length", results_of("length", wrong_length=[None, 4]))
    assert [length_ratio(study, regime) for regime in study.plan.regimes] == pytest.approx(
        [1.0, 1, 2, 3.6]
    )
    nothing = compared("length", [])
    assert [length_ratio(nothing, regime) for regime in nothing.plan.regimes] == [None, 1, 2, 4]
    assert {point.effect.pairs for point in length_points([study], METHODS)} == {0, 3}
    # Its regimes differ in the room for a response, which changes the ratio.
    budget = compared("budget", results_of("budget", max_response_length=[128]))
    ratios = [length_ratio(budget, regime) for regime in budget.plan.regimes]
    assert ratios == [None, None, pytest.approx(7.2), None]


def test_studies_of_length_share_a_panel():
    length = compared("length", results_of("length", wrong_length=[4]))
    budget = compared("budget", results_of("budget", seeds=2, max_response_length=[128]))
    points = length_points([length, budget], METHODS)
    assert len(points) == len(METHODS) * (len(length.plan.regimes) + len(budget.plan.regimes))
    assert len({point.panel for point in points}) == 1
    assert sorted({point.effect.pairs for point in points}) == [0, 2, 3]
    text = caption(compared("sparsity", []), [length, budget])
    assert "and `length` and `budget` (by the measured ratio of lengths), in order" in text
    assert "; 2 to 3 pairs a point" in text


def test_the_same_runs_give_the_same_picture(tmp_path):
    sparsity = compared("sparsity", results_of("sparsity", warm_start=[0.05, 0.1]))
    length = compared("length", results_of("length", seeds=2, wrong_length=[4]))
    for name in ("a.svg", "b.svg"):
        draw_map(sparsity, [length], tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for words in ("wrong answers short", "wrong answers 4 x right ones", "0.5 %", "not run"):
        assert words in text
    for method in METHODS:
        assert method in text
    # Whoever measured nothing of the shortest answers cannot say how long they are.
    assert "not run: wrong answers short" in text


def test_a_point_that_is_missing_changes_the_picture(tmp_path):
    length = compared("length", results_of("length"))
    draw_map(compared("sparsity", results_of("sparsity")), [length], tmp_path / "a.svg")
    draw_map(
        compared("sparsity", results_of("sparsity", tuple(GAINS)[:-1])),
        [length],
        tmp_path / "b.svg",
    )
    whole, lacking = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert "not run" not in whole
    assert "not run" in lacking


def test_the_caption_counts_pairs_and_points():
    sparsity = compared("sparsity", results_of("sparsity"))
    length = compared("length", results_of("length", seeds=2, wrong_length=[4]))
    text = caption(sparsity, [length])
    assert "2 to 3 pairs a point" in text
    others, lengths = (len(METHODS) * len(study.plan.regimes) for study in (sparsity, length))
    # All of the one study, and one length of the other.
    run, planned = others + len(METHODS), others + lengths
    assert f"{run} of {planned} planned points were run, the others are marked as not run." in text
    assert "; 3 pairs a point" in caption(sparsity, [compared("length", results_of("length"))])
    nothing = caption(compared("sparsity", []), [compared("length", [])])
    assert f"no pairs a point. 0 of {planned} planned points were run" in nothing
