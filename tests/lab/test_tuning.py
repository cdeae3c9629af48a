"""Studies that first choose a learning rate for every variant, and then compare."""

import math
from functools import partial

import pytest
from lab_policies import quick_study

from hpo_verl.lab import study as study_module
from hpo_verl.lab.study import cell_path, count_missing, missing_cells, run_study
from hpo_verl.lab.trainer import Outcome
from hpo_verl.report.studies import read_results

RATES = (1e-4, 1e-3, 1e-2)
TASKS = ("countdown3", "telelogs")


def tuned_study():
    """Two regimes, two variants, three rates; seeds 5 and 6 tune, 7, 8 and 9 are compared."""
    changes = ["tuning_seeds=2", "seeds=3", "first_seed=5", f"task=[{','.join(TASKS)}]"]
    changes.append(f"training.learning_rate=[{','.join(map(str, RATES))}]")
    return quick_study("rates", *changes, only=["grpo", "a_hpo"])


BEST = {
    ("countdown3", "grpo"): 1e-3, ("countdown3", "a_hpo"): 1e-2,
    ("telelogs", "grpo"): 1e-4, ("telelogs", "a_hpo"): 1e-3,
}  # fmt: skip


def area(cell):
    """0.5 on average at the best rate and 0.4 beside it, though each is ahead on one seed."""
    rate = cell.training.learning_rate
    if rate == BEST[cell.task, cell.variant]:
        return 0.9 if cell.seed == 5 else 0.1
    return 0.4


def test_tuning_seeds_run_every_rate():
    study = tuned_study()
    cells = study.cells()
    found = {(c.seed, c.task, c.variant, c.training.learning_rate) for c in cells}
    expected = {(s, t, v, r) for s in (5, 6) for t, v in BEST for r in RATES}
    assert found == expected
    assert len(cells) == len(expected)
    # Three more seeds of four pairs of regime and variant.
    assert study.size == len(expected) + 3 * 4


def test_later_seeds_run_the_rate_with_the_largest_mean_area():
    study = tuned_study()
    compared = study.compared({cell.name: area(cell) for cell in study.cells()})
    found = {(c.seed, c.task, c.variant): c.training.learning_rate for c in compared}
    assert found == {(seed, *key): rate for seed in (7, 8, 9) for key, rate in BEST.items()}
    assert len(compared) == len(found)
    # Seed by seed.
    assert [cell.seed for cell in compared] == [7] * 4 + [8] * 4 + [9] * 4


def test_a_tie_goes_to_the_smaller_rate():
    study = tuned_study()
    even = study.compared({cell.name: 0.3 for cell in study.cells()})
    assert {cell.training.learning_rate for cell in even} == {1e-4}
    upper = {c.name: 0.0 if c.training.learning_rate == 1e-4 else 0.3 for c in study.cells()}
    assert {cell.training.learning_rate for cell in study.compared(upper)} == {1e-3}


def test_without_tuning_seeds_every_seed_runs_every_rate():
    rates = ",".join(map(str, RATES))
    study = quick_study("rates", f"training.learning_rate=[{rates}]", only=["grpo"])
    assert {cell.seed for cell in study.cells()} == {0, 1}
    assert study.size == len(study.cells()) == 2 * len(RATES)
    assert study.compared({}) == []


def outcome_of(cell):
    rows = [{"step": 0.0, "success": area(cell), "responses_sampled": math.nan}]
    rows += [
        {"step": float(step), "success": area(cell), "responses_sampled": 16.0 * step}
        for step in (1, 2)
    ]
    return Outcome(rows, {"status": "finished", "seconds": 1.0, "warm_start_success": 0.05})


def ignore(cell, outcome):
    """Report nothing."""


def test_what_tunes_is_missing_first_and_then_what_it_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "run_cell", outcome_of)
    study = tuned_study()
    cells = study.cells()
    run = partial(study_module._run_and_write, folder=tmp_path, command="", tuning=False)
    assert missing_cells(study, tmp_path) == cells
    assert count_missing(study, tmp_path) == study.size
    study_module._run_cells(run, cells[:-1], 1, ignore)
    assert missing_cells(study, tmp_path) == cells[-1:]
    assert count_missing(study, tmp_path) == 1 + 12
    study_module._run_cells(run, cells[-1:], 1, ignore)
    compared = study.compared({cell.name: area(cell) for cell in cells})
    assert missing_cells(study, tmp_path) == compared
    assert count_missing(study, tmp_path) == 12
    study_module._run_cells(run, compared[:5], 1, ignore)
    assert missing_cells(study, tmp_path) == compared[5:]
    assert count_missing(study, tmp_path) == 7


@pytest.mark.parametrize("cut_after", [7, 26])
def test_a_study_goes_through_both_phases_and_resumes_in_either(tmp_path, monkeypatch, cut_after):
    ran = []

    def run(cell):
        if len(ran) == cut_after:
            raise KeyboardInterrupt
        ran.append(cell.name)
        return outcome_of(cell)

    study = tuned_study()
    with monkeypatch.context() as patched:
        patched.setattr(study_module, "run_cell", run)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, tmp_path, 1, ignore)
    assert count_missing(study, tmp_path) == study.size - cut_after
    monkeypatch.setattr(study_module, "run_cell", lambda c: ran.append(c.name) or outcome_of(c))
    run_study(study, tmp_path, 1, ignore)
    assert len(ran) == len(set(ran)) == study.size
    cells = study.cells()
    # Nothing is compared before everything is tuned.
    assert set(ran[: len(cells)]) == {cell.name for cell in cells}
    assert missing_cells(study, tmp_path) == []
    assert count_missing(study, tmp_path) == 0
    compared = study.compared({cell.name: area(cell) for cell in cells})
    assert all(cell_path(tmp_path, cell).exists() for cell in [*cells, *compared])


def test_a_result_says_whether_it_tunes(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "run_cell", outcome_of)
    run_study(tuned_study(), tmp_path, 1, ignore)
    tuning = {(r.cell["seed"], r.facts["tuning"]) for r in read_results(tmp_path)}
    assert tuning == {(5, True), (6, True), (7, False), (8, False), (9, False)}
