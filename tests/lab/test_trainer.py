"""Runs of single cells: repeatable, paired by seed, and described step by step."""

import dataclasses

import pytest
import torch
from lab_policies import IN_LAB, keep_warm_starts, quick_study

from hpo_verl.lab import warm_start
from hpo_verl.lab.learner import Diverged
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.trainer import Trainer, run_cell


def cell_of(variant, *overrides, name="rates", seed=0):
    """A short run, whose warm start is a random policy."""
    study = quick_study(name, *overrides, only=[variant])
    keep_warm_starts(study)
    return next(c for c in study.cells() if c.variant == variant and c.seed == seed)


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds" and v == v} for row in rows]


def test_a_run_says_with_which_policy_it_began(graded):
    study = quick_study("rates", "training.steps=1", "seeds=1", only=["grpo", "a_hpo"])
    grpo, a_hpo = study.cells()
    keep_warm_starts(study)
    first = run_cell(grpo).facts["began_with"]
    assert len(first) == 64
    assert run_cell(a_hpo).facts["began_with"] == first
    keep_warm_starts(study, seed=1)
    assert run_cell(grpo).facts["began_with"] != first


def test_a_cell_repeats_bit_for_bit_and_describes_its_steps(graded):
    cell = cell_of("a_hpo")
    first, second = run_cell(cell), run_cell(cell)
    assert without_time(first.rows) == without_time(second.rows)
    assert first.facts["status"] == "finished"
    assert [row["step"] for row in first.rows] == [0, 1, 2]
    last = first.rows[-1]
    assert 0 <= last["alpha"] <= 1
    assert last["gradient_norm"] > 0
    assert last["entropy"] > 0
    assert last["response_length_std"] > 0
    assert 0 <= last["truncated"] <= 1
    assert last["responses_sampled"] == 2 * 4 * 4
    assert not any(key.startswith("pass@") for row in first.rows for key in row)


def test_pass_at_k_is_measured_before_and_after_training(graded):
    rows = run_cell(cell_of("grpo", "evaluation.samples=4")).rows
    measured = [{key for key in row if key.startswith("pass@")} for row in rows]
    assert measured == [{"pass@1", "pass@2", "pass@4"}, set(), {"pass@1", "pass@2", "pass@4"}]
    # What is measured has no part in training.
    plain = run_cell(cell_of("grpo")).rows
    kept = [{k: v for k, v in row.items() if not k.startswith("pass@")} for row in rows]
    assert without_time(kept) == without_time(plain)


def test_variants_of_a_seed_share_their_first_batch(graded):
    a_hpo, grpo = (run_cell(cell_of(name)).rows for name in ("a_hpo", "grpo"))
    assert a_hpo[0] == grpo[0]
    for key in ("solve_rate", "entropy", "response_length", "positive_fraction"):
        assert a_hpo[1][key] == grpo[1][key]
    other = run_cell(cell_of("grpo", seed=1)).rows
    assert other[1]["entropy"] != grpo[1]["entropy"]


def test_a_response_is_as_long_as_the_regime_permits(graded):
    rows = run_cell(cell_of("grpo", "max_response_length=5")).rows
    assert rows[1]["response_length"] <= 5
    assert rows[1]["truncated"] > 0


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, a in IN_LAB.items()
        if a.loss.token_fields or a.loss.mini_batch_sums or a.estimator.needs
    ],
)
def test_what_needs_more_than_rewards_trains_and_repeats_bit_for_bit(graded, name):
    cell = cell_of(name, name="neighbours")
    first, second = (run_cell(cell).rows for _ in range(2))
    assert without_time(first) == without_time(second)
    assert first[1]["gradient_norm"] > 0
    # As many responses as the others have, in groups or alone.
    assert first[-1]["responses_sampled"] == 2 * 4 * 4


DAPO = "+variants.dapo.algorithm=dapo"


def test_dapo_samples_until_enough_groups_have_a_spread(graded):
    rows = run_cell(cell_of("dapo", DAPO)).rows
    assert rows[-1]["zero_spread_group_fraction"] == 0.0
    assert rows[-1]["responses_sampled"] > 2 * 4 * 4


def test_without_any_reward_there_is_no_update():
    # A random policy never solves a puzzle.
    cell = cell_of("dapo", DAPO)
    rows = run_cell(cell).rows
    assert rows[-1]["solve_rate"] == 0.0
    most = cell.training.max_generation_batches
    assert rows[-1]["responses_sampled"] == 2 * 4 * 4 * most
    rows = run_cell(cell_of("grpo")).rows
    assert rows[-1]["gradient_norm"] == 0.0
    assert rows[-1]["zero_spread_group_fraction"] == 1.0


@pytest.mark.parametrize("lost", [1, 2])
def test_a_run_that_diverges_counts_as_one_without_success(graded, monkeypatch, lost):
    step = Trainer.step

    def diverge(self, number):
        if number == lost:
            raise Diverged("gradient")
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", diverge)
    outcome = run_cell(cell_of("grpo", "evaluation.samples=2", "training.steps=3"))
    assert outcome.facts["status"] == "diverged"
    assert [row["step"] for row in outcome.rows] == [0, 1, 2, 3]
    assert [row["success"] for row in outcome.rows[lost:]] == [0.0] * (4 - lost)
    assert {"pass@1", "pass@2"} < set(outcome.rows[0])
    last = {"step": 3.0, "success": 0.0, "pass@1": 0.0, "pass@2": 0.0}
    assert outcome.rows[-1] == last
    assert not any("pass@1" in row for row in outcome.rows[1:-1])


def test_a_weight_that_is_not_finite_is_a_divergence(graded):
    cell = cell_of("grpo")
    trainer = Trainer(cell, Policy.load(warm_start.policy_folder(cell)))
    (rollout,) = trainer._sample(1)
    with torch.no_grad():
        trainer.policy.weights[0].fill_(torch.nan)
    with pytest.raises(Diverged):
        trainer._update(rollout, 1)


def test_passes_over_a_batch_leave_its_responses_as_they_are(graded):
    cell = cell_of("grpo")
    longer = dataclasses.replace(cell, training=dataclasses.replace(cell.training, epochs=3))
    once, thrice = run_cell(cell).rows, run_cell(longer).rows
    for key in ("solve_rate", "entropy", "response_length", "responses_sampled"):
        assert once[1][key] == thrice[1][key]
    assert once[1]["gradient_norm"] != thrice[1]["gradient_norm"]
