"""Tables of a study: effects, what was not run, learning rates, and dissected steps."""

import math

import pytest
from lab_results import made_up_cells, made_up_result, made_up_results

from hpo_verl.report.comparison import Comparison
from hpo_verl.report.dissections import dissections
from hpo_verl.report.effects import NOT_RUN, effect_rows, effect_text, study_text
from hpo_verl.report.markdown import markdown_table
from hpo_verl.report.rates import chosen_rates, stable_rates
from hpo_verl.report.regimes import read_plan
from hpo_verl.report.statistics import Effect, Interval

GAINS = {"grpo": 0.03, "hysteretic_grpo": 0.06, "a_hpo": 0.05, "mean_length": 0.01}


def gain(cell):
    return GAINS[cell["variant"]]


def compared(study, results):
    return Comparison(read_plan(study), results)


def row_of(text, *words):
    return next(line for line in text.splitlines() if all(word in line for word in words))


def test_a_table_leaves_out_columns_without_a_value():
    rows = [{"a": 0.25, "b": None, "c": Interval(1.0, 0.5, 1.5)}, {"a": math.nan, "d": "x"}]
    assert markdown_table(rows).splitlines() == [
        "| a | c | d |",
        "| --- | --- | --- |",
        "| 0.250 | 1.000 [0.500, 1.500] |  |",
        "|  |  | x |",
    ]
    assert markdown_table([]) == ""


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Effect(0, None), NOT_RUN),
        (Effect(1, Interval(0.01, math.nan, math.nan)), "+0.010 (1 pair only)"),
        (Effect(2, Interval(-0.01, math.nan, math.nan)), "-0.010 (2 pairs only)"),
        (Effect(3, Interval(0.01, -0.002, 0.03)), "+0.010 [-0.002, +0.030]"),
    ],
)
def test_an_effect_says_how_much_it_rests_on(found, text):
    assert effect_text(found) == text


def test_effects_by_hand():
    comparison = compared("lag", made_up_results("lag", gain, **{"training.lag": [4]}))
    (regime,) = comparison.runs
    rows = {row["method"]: row for row in effect_rows(comparison, regime)}
    assert list(rows) == [f"`{name}`" for name in GAINS]
    a_hpo = rows["`a_hpo`"]
    assert (a_hpo["runs"], a_hpo["collapsed"], a_hpo["pairs"], a_hpo["responses"]) == (
        5,
        0,
        5,
        "512",
    )
    # At the end 0.1 + 4 * 0.05 + 0.01 seed; without the lowest and the highest of five: 0.32.
    assert a_hpo["success at the end"].point == pytest.approx(0.32)
    # 0.02 more per step: 0.04 of area, and 0.02 after one of four steps, in every seed.
    assert a_hpo["area - grpo"] == "+0.040 [+0.040, +0.040]"
    assert a_hpo["early - grpo"] == "+0.020 [+0.020, +0.020]"
    assert rows["`mean_length`"]["area - grpo"] == "-0.040 [-0.040, -0.040]"
    assert rows["`grpo`"]["area - grpo"] is None


def test_pass_at_k_is_that_of_the_largest_k():
    results = []
    for cell in made_up_cells("lag", ["grpo", "a_hpo"], range(3), **{"training.lag": [4]}):
        after = {"grpo": 0.5, "a_hpo": 0.75}[cell["variant"]]
        chances = {"pass@8": [0.1, math.nan, 0.2], "pass@64": [0.3, math.nan, after]}
        results.append(made_up_result(cell, [0.1, 0.1, 0.1], **chances))
    comparison = compared("lag", results)
    (regime,) = comparison.runs
    row = effect_rows(comparison, regime)[1]
    assert tuple(row["pass@64"]) == (0.75, 0.75, 0.75)
    assert row["pass@64 - grpo"] == "+0.250 [+0.250, +0.250]"
    assert "pass@8" not in row


def test_what_was_planned_and_not_run_is_said():
    assert study_text(compared("lag", [])) == NOT_RUN
    results = made_up_results("lag", gain, ["grpo", "a_hpo"], **{"training.lag": [4, 5]})
    comparison = compared("lag", results)
    text = study_text(comparison)
    assert row_of(text, "1 steps old").startswith(
        "| sampled by a policy 1 steps old | all | not run"
    )
    row = row_of(text, " 4 steps old", "not run")
    assert "| `hysteretic_grpo`, `mean_length` | not run |" in row
    # Nobody planned a lag of five.
    assert sum(NOT_RUN in line for line in text.splitlines()) == 3
    assert NOT_RUN not in study_text(comparison, planned=False)
    steps = results[0].cell["training"]["steps"]
    assert f"20 runs, seeds: 5; {steps} steps of 64 x 8 responses in 4 mini-batches" in text


def test_what_a_regime_begins_with_is_said():
    text = study_text(compared("length", made_up_results("length", lambda cell: 0.01)))
    # Success 0.1 to 0.14; right answers of 10 tokens, wrong ones 0.9 * 4 times as long.
    row = row_of(text, "wrong answers 4 x right ones", "3.60")
    assert "| 12.0% [" in row
    assert "| 10.0 | 36.0 | 3.60 [3.60, 3.60] |" in row


def test_collapsed_runs_are_counted():
    def curve(cell):
        return [0.1, 0.5, 0.2] if cell["seed"] else [0.1, 0.5, 0.3]

    cells = made_up_cells("lag", ["grpo"], range(3), **{"training.lag": [4]})
    comparison = compared("lag", [made_up_result(cell, curve(cell)) for cell in cells])
    (regime,) = comparison.runs
    assert effect_rows(comparison, regime)[0]["collapsed"] == 2


def test_chosen_rates_with_the_areas_that_chose_them():
    def at(cell):
        return 0.05 if cell["training"]["learning_rate"] == 1e-2 else 0.01

    results = made_up_results("tuned", at, ["grpo"], range(4))
    text = chosen_rates(compared("tuned", results))
    assert text.splitlines()[0] == (
        "| regime | method | area at 0.0001 | area at 0.0003 | area at 0.001 | area at 0.003 | "
        "area at 0.01 | best rate | at the grid's end | seeds |"
    )
    # Mean of seeds 0 to 3: 0.1 + 0.015, and half of what is gained in four steps.
    assert row_of(text, "`grpo`") == (
        "| countdown3 | `grpo` | 0.135 | 0.135 | 0.135 | 0.135 | 0.215 | 0.01 | yes | 4 |"
    )
    assert chosen_rates(compared("tuned", [])) == NOT_RUN
    # A regime that nobody planned, and of which only the seeds that choose have run yet.
    other = made_up_results("tuned", at, ["grpo"], range(4), warm_start=0.3)
    assert row_of(chosen_rates(compared("tuned", other)), "`grpo`").startswith("| warm start 30 %")


def test_the_largest_stable_rate():
    def curve(cell):
        rate, seed = cell["training"]["learning_rate"], cell["seed"]
        lost = (rate > 2e-3 and seed == 0) or (rate > 5e-3 and cell["variant"] == "grpo")
        return [0.1, 0.5, 0.0 if lost else 0.5]

    cells = made_up_cells("rates", ["grpo", "a_hpo"], range(2))
    results = [made_up_result(cell, curve(cell)) for cell in cells]
    results = [r for r in results if r.cell["variant"] != "a_hpo" or r.cell["seed"]]
    text = stable_rates(compared("rates", results))
    assert row_of(text, "`grpo`").split(" | ")[2:] == [
        *["0 of 2"] * 3, "1 of 2", "2 of 2", "2 of 2", "0.001 |"
    ]  # fmt: skip
    assert row_of(text, "`a_hpo`").split(" | ")[2:] == [*["0 of 1"] * 6, "0.03 |"]
    assert stable_rates(compared("rates", [])) == NOT_RUN


def test_rates_that_were_not_run_and_none_that_is_stable():
    [cell] = made_up_cells("rates", ["grpo"], range(1), **{"training.learning_rate": [1e-3]})
    text = stable_rates(compared("rates", [made_up_result(cell, [0.1, 0.5, 0.0])]))
    assert row_of(text, "`grpo`").split(" | ")[2:] == [
        NOT_RUN, NOT_RUN, "1 of 1", *[NOT_RUN] * 3, "none of them |"
    ]  # fmt: skip
    # The one that was run is stable; what lies beyond it nobody knows.
    text = stable_rates(compared("rates", [made_up_result(cell, [0.1, 0.5, 0.5])]))
    assert row_of(text, "`grpo`").endswith(f"| {NOT_RUN} | 0.001 at least |")
    # Between one that is stable and one that is not, one was not run.
    [far] = made_up_cells("rates", ["grpo"], range(1), **{"training.learning_rate": [1e-2]})
    results = [made_up_result(cell, [0.1, 0.5, 0.5]), made_up_result(far, [0.1, 0.5, 0.0])]
    text = stable_rates(compared("rates", results))
    assert row_of(text, "`grpo`").split(" | ")[5:] == [
        NOT_RUN, "1 of 1", NOT_RUN, "0.001 at least |"
    ]  # fmt: skip


def test_dissections_at_the_first_step_and_over_the_later_ones():
    results = []
    for cell in made_up_cells("length", ["grpo"], range(3), wrong_length=[4]):
        norms = [math.nan, 1.0 + cell["seed"], math.nan, 3.0, 5.0]
        shifts = [math.nan, -0.5, math.nan, 0.25, 0.75]
        results.append(
            made_up_result(
                cell, [0.1] * 5, positive_gradient_norm=norms, right_shift_negative=shifts
            )
        )
    text = dissections(compared("length", results))
    assert text.splitlines()[0] == (
        "| regime | method | steps | runs | norm, positives | right answers, by negatives |"
    )
    # Norms 1, 2, 3 at the first step, and (3 + 5) / 2 later.
    assert "| first | 3 | 2.000 [1.000, 3.000] | -0.500 [-0.500, -0.500] |" in text
    assert "| later | 3 | 4.000 [4.000, 4.000] | 0.500 [0.500, 0.500] |" in text


def test_nothing_was_dissected():
    assert dissections(compared("lag", made_up_results("lag", gain))) == NOT_RUN
