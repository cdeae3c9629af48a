"""A run stands in every study that plans it, whichever study made it."""

import json

import pytest
from lab_results import made_up_results

from hpo_verl.report.comparison import compare_studies
from hpo_verl.report.dissections import dissections
from hpo_verl.report.effects import NOT_RUN, study_text
from hpo_verl.report.evidence import manifest

COMMON = {"warm_start": [0.05], "wrong_length": [4]}
GAINS = {"grpo": 0.03, "a_hpo": 0.05, "alpha_0.0": 0.02}


def gain(cell):
    return GAINS.get(cell["variant"], 0.04)


def runs(study, variants, seeds, **changes):
    return made_up_results(study, gain, variants, seeds, **changes)


def of_length(variants=("grpo", "a_hpo", "alpha_0.0"), seeds=range(4), **changes):
    return runs("length", list(variants), seeds, wrong_length=[4], **changes)


def compare(**results):
    return {study.study: study for study in compare_studies(results, ["sparsity", "length"])}


def test_a_regime_that_two_studies_plan_is_run_once():
    studies = compare(length=of_length())
    sparsity = studies["sparsity"]
    (regime,) = sparsity.runs
    assert dict(regime)["warm_start"] == 0.05
    # `sparsity` has no variant without negatives.
    assert list(sparsity.runs[regime]) == ["grpo", "a_hpo"]
    assert sparsity.effect(regime, "a_hpo", "grpo").pairs == 4
    assert sparsity.results == []
    assert "8 runs, 8 of them of `length`, seeds: 4" in study_text(sparsity)
    assert studies["length"].lent == []
    assert json.loads(json.dumps(manifest([*studies.values()])))["length"]["runs"] == 12
    assert list(manifest([*studies.values()])) == ["length"]


def test_own_runs_come_first_and_others_add_pairs():
    own = runs("sparsity", ["grpo", "a_hpo"], range(2), **COMMON)
    for result in own:
        result.rows["success"] = 0.5
    sparsity = compare(sparsity=own, length=of_length())["sparsity"]
    (regime,) = sparsity.runs
    found = sparsity.runs[regime]["grpo"]
    assert list(found.index) == [0, 1, 2, 3]
    assert list(found["final"][:2]) == [0.5, 0.5]
    assert found["final"][2] != 0.5
    assert len(sparsity.lent) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation.questions": 64},
        {"training.steps": 9},
        {"max_response_length": 81},
        {"policy": "/policies/other"},
    ],
)
def test_a_run_that_differs_is_not_lent(change):
    sparsity = compare(length=of_length(**change))["sparsity"]
    assert sparsity.lent == []
    assert sparsity.runs == {}


def test_a_variant_of_another_meaning_and_a_run_that_tunes_are_not_lent():
    results = of_length(["grpo", "a_hpo"], range(1))
    results[0].facts["tuning"] = True
    results[1].cell["settings"] = {"algorithm.hpo.ema": 0.9}
    assert compare(length=results)["sparsity"].lent == []


def test_runs_are_measured_as_the_studys_own_in_that_regime():
    own = runs("sparsity", ["grpo"], range(1), **COMMON, **{"evaluation.every": 2})
    assert compare(sparsity=own, length=of_length())["sparsity"].lent == []


def test_a_dissection_stands_where_it_was_made():
    results = of_length(["grpo"])
    for result in results:
        for column in ("positive_gradient_norm", "negative_gradient_norm", "gradient_cosine"):
            result.rows[column] = 1.0
        for column in ("right_shift_positive", "right_shift_negative"):
            result.rows[column] = 0.5
    studies = compare(length=results)
    assert dissections(studies["length"]) != NOT_RUN
    assert dissections(studies["sparsity"]) == NOT_RUN
