"""Cells, their files, and studies that are killed and go on."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from lab_policies import IN_LAB, QUICK, keep_warm_starts, quick_study
from waiting import wait_until

from hpo_verl import cli
from hpo_verl.errors import ConfigError, DataError, EnvironmentCheckError
from hpo_verl.lab import study as study_module
from hpo_verl.lab import warm_start
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.study import missing_cells, run_study
from hpo_verl.lab.trainer import Diverged, Outcome, Trainer, run_cell
from hpo_verl.report.studies import read_results
from hpo_verl.runs.files import locked


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path / "cache"))


def test_a_cache_whose_file_system_keeps_no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("hpo_verl.runs.files.fcntl.flock", refuse)
    with pytest.raises(EnvironmentCheckError, match=r"no locks \(ENOLCK: .*set HPO_VERL_CACHE"):
        warm_start.make(quick_study().cells()[0])


def cell_of(study, variant, seed=0):
    return next(c for c in study.cells() if c.variant == variant and c.seed == seed)


@pytest.fixture
def study():
    chosen = quick_study()
    keep_warm_starts(chosen)
    return chosen


# Rewards by the length of a response, so that a random policy has something to learn from.
@pytest.fixture
def graded(monkeypatch):
    original = Trainer.__init__

    def score(text, truth):
        reward = float(len(text) % 3 == 0)
        return {"score": reward, "acc": reward, "format": float(len(text) % 2)}

    def init(self, cell, policy):
        original(self, cell, policy)
        self.task = dataclasses.replace(self.task, score=score)

    monkeypatch.setattr(Trainer, "__init__", init)


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds" and v == v} for row in rows]


def test_a_cell_repeats_bit_for_bit_and_describes_its_steps(study, graded):
    cell = cell_of(study, "a_hpo")
    first, second = run_cell(cell), run_cell(cell)
    assert without_time(first.rows) == without_time(second.rows)
    assert first.facts["status"] == "finished"
    assert [row["step"] for row in first.rows] == [0, 1, 2]
    last = first.rows[-1]
    assert 0 <= last["alpha"] <= 1
    assert last["gradient_norm"] > 0
    assert last["entropy"] > 0
    assert last["response_length_std"] > 0
    assert last["responses_sampled"] == 2 * 4 * 4


def test_variants_of_a_seed_share_their_first_batch(study, graded):
    a_hpo, grpo = (run_cell(cell_of(study, name)).rows for name in ("a_hpo", "grpo"))
    assert a_hpo[0] == grpo[0]
    for key in ("solve_rate", "entropy", "response_length", "positive_fraction"):
        assert a_hpo[1][key] == grpo[1][key]
    other = run_cell(cell_of(study, "grpo", seed=1)).rows
    assert other[1]["entropy"] != grpo[1]["entropy"]


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, a in IN_LAB.items()
        if a.loss.token_fields or a.loss.mini_batch_sums or a.estimator.needs
    ],
)
def test_what_needs_more_than_rewards_trains_and_repeats_bit_for_bit(graded, name):
    study = quick_study("sparse", "tasks=[countdown3]", "warm_starts=[0.05]")
    keep_warm_starts(study)
    first, second = (run_cell(cell_of(study, name)).rows for _ in range(2))
    assert without_time(first) == without_time(second)
    assert first[1]["gradient_norm"] > 0
    # As many responses as the others have, in groups or alone.
    assert first[-1]["responses_sampled"] == 2 * 4 * 4


def test_dapo_samples_until_enough_groups_have_a_spread(graded):
    study = quick_study("sparse", "tasks=[countdown3]", "warm_starts=[0.05]")
    keep_warm_starts(study)
    rows = run_cell(cell_of(study, "dapo")).rows
    assert rows[-1]["zero_spread_group_fraction"] == 0.0
    assert rows[-1]["responses_sampled"] > 2 * 4 * 4


def test_without_any_reward_there_is_no_update(study):
    study = quick_study("sparse", "tasks=[countdown3]", "warm_starts=[0.05]")
    keep_warm_starts(study)
    # A random policy never solves a puzzle.
    rows = run_cell(cell_of(study, "dapo")).rows
    assert rows[-1]["solve_rate"] == 0.0
    assert rows[-1]["responses_sampled"] == 2 * 4 * 4 * study.training.max_generation_batches
    rows = run_cell(cell_of(study, "grpo")).rows
    assert rows[-1]["gradient_norm"] == 0.0
    assert rows[-1]["zero_spread_group_fraction"] == 1.0


def test_momentum_alone_moves_nothing(study, graded):
    cell = cell_of(study, "a_hpo")
    trainer = Trainer(cell, Policy.load(warm_start.policy_folder(cell)))
    trainer.step(1)
    (rollout,) = trainer._sample(2)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    nothing = torch.zeros(rollout.responses.mask.shape)
    assert trainer._mini_batch(rollout, nothing, {}, torch.arange(16)) == ({}, 0.0)
    after = trainer.parameters
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_leaving_out_rows_without_advantage_changes_no_update(study, graded, monkeypatch):
    """The mini-batch that the trainer makes, against the whole one."""
    cell = cell_of(study, "a_hpo")
    trainer = Trainer(cell, Policy.load(warm_start.policy_folder(cell)))
    (rollout,) = trainer._sample(1)
    tokens, mask, old_log_prob = rollout.responses
    groups = torch.arange(4).repeat_interleave(4)
    advantages, _, _ = trainer.objective.advantages(rollout.rewards, groups, mask, {})
    assert (advantages == 0).all(dim=-1).any()
    log_prob = trainer.policy.log_probs(rollout.prompts, tokens, mask)
    slopes, _ = trainer.objective.gradient(
        log_prob, old_log_prob, advantages, mask, {}, (int(mask.sum()), 16)
    )
    expected = torch.autograd.grad(log_prob, trainer.parameters, slopes)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    trainer._mini_batch(rollout, advantages, {}, torch.arange(16))
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected))
    scale = min(1.0, cell.training.max_grad_norm / (norm + 1e-6))
    for parameter, gradient in zip(trainer.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * scale, rtol=1e-4, atol=1e-6)


def test_a_run_that_diverges_counts_as_one_without_success(study, monkeypatch):
    def step(self, number):
        raise Diverged("gradient")

    monkeypatch.setattr(Trainer, "step", step)
    outcome = run_cell(cell_of(study, "grpo"))
    assert outcome.facts["status"] == "diverged"
    assert [row["success"] for row in outcome.rows[1:]] == [0.0, 0.0]


def test_a_weight_that_is_not_finite_is_a_divergence(study, graded):
    cell = cell_of(study, "grpo")
    trainer = Trainer(cell, Policy.load(warm_start.policy_folder(cell)))
    (rollout,) = trainer._sample(1)
    with torch.no_grad():
        trainer.parameters[0].fill_(torch.nan)
    with pytest.raises(Diverged):
        trainer._update(rollout, 0.0)


def outcome_of(cell):
    rows = [
        {
            "step": float(s),
            "success": 0.1 * s,
            "responses_sampled": math.nan if s == 0 else 16.0 * s,
        }
        for s in range(cell.training.steps + 1)
    ]
    return Outcome(rows, {"status": "finished", "seconds": 1.0, "warm_start_success": 0.05})


def test_a_result_is_there_whole_or_not_at_all(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "run_cell", outcome_of)
    folder = tmp_path / "runs"

    def fail(source, target):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(DataError, match="cannot write"):
            run_study(study, folder, 1, lambda cell, outcome: None)
    assert not [path for path in folder.iterdir() if "parquet" in path.name]
    run_study(study, folder, 1, lambda cell, outcome: None, "the command")
    results = read_results(folder)
    cells = {cell.name: json.loads(json.dumps(dataclasses.asdict(cell))) for cell in study.cells()}
    assert [result.cell for result in results] == [cells[name] for name in sorted(cells)]
    assert list(results[0].rows["success"]) == pytest.approx([0.0, 0.1, 0.2])
    environment = results[0].facts["environment"]
    assert environment["commit"]
    assert environment["command"] == "the command"


def test_a_finished_cell_is_never_run_again(study, tmp_path, monkeypatch):
    ran = []

    def run(cell):
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(cell.name)
        return outcome_of(cell)

    monkeypatch.setattr(study_module, "run_cell", run)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path, 1, lambda cell, outcome: None)
    first = list(ran)
    ran.clear()
    monkeypatch.setattr(
        study_module, "run_cell", lambda cell: ran.append(cell.name) or outcome_of(cell)
    )
    reports = []
    run_study(study, tmp_path, 1, lambda cell, outcome: reports.append(cell.name))
    assert sorted(first + ran) == sorted(cell.name for cell in study.cells())
    assert reports == ran
    assert missing_cells(study, tmp_path) == []


def test_runs_that_trained_differently_do_not_share_a_folder(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "run_cell", outcome_of)
    run_study(study, tmp_path, 1, lambda cell, outcome: None)
    other = quick_study("alpha", "training.steps=3")
    with pytest.raises(ConfigError, match=r"training.steps = 2 and 3.*--out"):
        missing_cells(other, tmp_path)


def test_two_studies_do_not_run_in_one_folder_at_once(study, tmp_path):
    with locked(tmp_path), pytest.raises(EnvironmentCheckError, match="--out"):
        run_study(study, tmp_path, 1, lambda cell, outcome: None)


@pytest.mark.timeout(300)
def test_a_killed_command_leaves_its_finished_cells_and_no_process(tmp_path):
    changes = ["seeds=1", "training.steps=8", "warm_starts=[0.05]"]
    chosen = quick_study("telelogs", *changes)
    keep_warm_starts(chosen)
    out = tmp_path / "runs"
    command = [
        sys.executable, "-c", "from hpo_verl.cli import main; main()", "lab", "run", "telelogs",
        *QUICK, *changes, "--out", str(out), "--workers", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(out.glob("*.parquet")) or process.poll() is not None, 200)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert before, error[-2000:]
    assert len(missing_cells(chosen, out)) == 7 - len(before)
    run_study(chosen, out, 1, lambda cell, outcome: None)
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(after) == 7
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "sparce"], "did you mean sparse"),
        (["run", "sparse", "sede=1"], "did you mean seeds"),
        (["run", "sparse", "--only", "hpoo"], "did you mean hpo"),
        (["report", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_wrong_input_ends_with_two_and_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "lab", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
