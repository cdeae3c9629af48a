"""What a study's file plans, and the words that tell its regimes apart."""

import pytest
from lab_results import made_up_cells

from hpo_verl.config.recipes import study_names
from hpo_verl.errors import ConfigError
from hpo_verl.report.regimes import read_plan, title, varying


def test_a_plan_is_what_the_file_crosses():
    plan = read_plan("sparsity")
    assert plan.baseline == "grpo"
    assert list(plan.variants) == ["grpo", "hysteretic_grpo", "a_hpo", "mean_length"]
    assert plan.variants["mean_length"] == {
        "algorithm": "hpo",
        "settings": {"algorithm.hpo.alpha": 1.0},
    }
    assert varying(plan.regimes) == ["warm_start", "wrong_length"]
    assert [title(regime, varying(plan.regimes)) for regime in plan.regimes[:3]] == [
        "warm start 0.5 %, wrong answers short",
        "warm start 0.5 %, wrong answers 4 x right ones",
        "warm start 1 %, wrong answers short",
    ]
    assert not plan.tuned


def test_a_tuned_plan_has_no_learning_rate():
    plan = read_plan("tuned")
    assert plan.tuned
    (regime,) = plan.regimes
    assert title(regime, varying(plan.regimes)) == "countdown3"
    cell = next(made_up_cells("tuned", ["grpo"]))
    assert plan.regime_of(cell) == regime


@pytest.mark.parametrize("study", study_names())
def test_every_planned_cell_is_of_a_planned_regime(study):
    plan = read_plan(study)
    cells = list(made_up_cells(study, seeds=[0]))
    assert {plan.regime_of(cell) for cell in cells} == set(plan.regimes)
    # No two regimes of a study share their title.
    titles = {title(regime, varying(plan.regimes)) for regime in plan.regimes}
    assert len(titles) == len(plan.regimes)


def test_regimes_that_no_file_names_have_words_too():
    (cell,) = made_up_cells(
        "lag", ["grpo"], [0], **{"training.lag": [2], "training.steps": 9, "policy": "/data/smol/"}
    )
    regime = read_plan("lag").regime_of(cell)
    keys = ["training.lag", "training.steps", "max_response_length", "policy"]
    assert title(regime, keys) == (
        "responses as long as the task permits, steps 9, sampled by a policy 2 steps old, "
        "policy smol"
    )


def test_an_unknown_study_is_refused():
    with pytest.raises(ConfigError, match=r"unknown study 'sparsty': .*sparsity"):
        read_plan("sparsty")
