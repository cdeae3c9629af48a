"""Recommendations: their strength from the effects of all regimes."""

import pytest
from lab_results import made_up_results

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.comparison import Comparison
from hpo_verl.report.recommendations import (
    Question,
    read_questions,
    recommendations,
    require_known,
    strength,
)
from hpo_verl.report.regimes import read_plan
from hpo_verl.report.statistics import Effect, Interval

UP, DOWN, OPEN = (
    Effect(10, Interval(point, point - 0.1, point + 0.1)) for point in (0.2, -0.2, 0.0)
)
QUESTION = Question("Both?", "a_hpo", "grpo")


@pytest.mark.parametrize(
    ("effects", "word"),
    [
        ([], "not measured"),
        ([UP] * 3 + [OPEN], "strong"),
        ([UP] * 3, "weak"),
        ([UP] * 2 + [OPEN] * 2, "weak"),
        ([UP] * 7 + [DOWN], "weak"),
        ([OPEN] * 9, "none"),
        # Of twenty regimes one is better by chance.
        ([UP] + [OPEN] * 19, "none"),
        ([UP] * 2 + [OPEN] * 18, "weak"),
        # One of twenty may be chance, so it does not say that it depends.
        ([UP, DOWN] + [OPEN] * 18, "none"),
        ([UP, DOWN, OPEN], "depends"),
        ([UP] * 2 + [DOWN] * 3 + [OPEN] * 13, "depends"),
        ([UP] * 2 + [DOWN] * 4 + [OPEN] * 13, "against"),
        ([DOWN, OPEN], "against"),
        ([DOWN] * 4 + [UP], "against"),
        ([DOWN] * 4, "strongly against"),
    ],
)
def test_strength(effects, word):
    assert strength(effects) == word


def compared(study, gains, seeds=range(10), **changes):
    results = made_up_results(
        study, lambda cell: gains[cell["variant"]], list(gains), seeds, **changes
    )
    return Comparison(read_plan(study), results)


def cells_of(studies):
    text = recommendations(studies, [QUESTION])
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


def test_regimes_are_counted_over_studies_and_each_once():
    gains = {"grpo": 0.03, "a_hpo": 0.05}
    lag = compared("lag", gains)
    # Its regime at 0.0003 is that of `staleness` with four mini-batches and one pass.
    rates = compared("rates", gains, **{"training.learning_rate": [3e-4]})
    staleness = compared("staleness", {"grpo": 0.03, "a_hpo": 0.01}, range(12))
    few = compared("budget", gains, range(9))
    ((question, what, rate, *numbers),) = cells_of([lag, rates, staleness, few])
    assert (question, what, rate) == ("Both?", "`a_hpo` - `grpo`", "the same")
    # Three lags better by 0.04; six regimes of staleness worse, one of them with more pairs than
    # in `rates`; those of nine pairs do not count.
    assert numbers == ["9", "3", "6", "0", "0.5", "-0.040", "against"]


def test_each_ones_best_rate_has_a_row_of_its_own():
    gains = {"grpo": 0.03, "a_hpo": 0.05}
    tuned = compared("tuned", gains, range(4))
    assert cells_of([tuned])[0][3:] == ["0", "0", "0", "0", "0.0", "not measured"]
    results = tuned.results + made_up_results(
        "tuned", lambda cell: gains[cell["variant"]], list(gains), range(4, 14),
        **{"training.learning_rate": [1e-4]},
    )  # fmt: skip
    first, second = cells_of([Comparison(tuned.plan, results)])
    assert first[2:4] == ["the same", "0"]
    assert second[2:] == ["each one's best", "1", "1", "0", "0", "0.1", "+0.040", "weak"]


def test_a_question_about_what_no_study_has_is_refused(tmp_path):
    study = Comparison(read_plan("lag"), [])
    require_known(tmp_path, [QUESTION], [study])
    with pytest.raises(DataError, match="'a_hop' is no variant of a study"):
        require_known(tmp_path, [Question("?", "a_hop", "grpo")], [study])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "must hold a list"),
        ("- {question: a, ours: b}", "entry 1 must have ours, question, theirs"),
        ("[", "cannot be read"),
    ],
)
def test_questions_that_cannot_be_read_are_refused(tmp_path, text, message):
    path = tmp_path / "questions.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"questions\.yaml: {message}"):
        read_questions(path)
    path.write_text("- {question: 'Both?', ours: a_hpo, theirs: grpo}")
    assert read_questions(path) == [QUESTION]
