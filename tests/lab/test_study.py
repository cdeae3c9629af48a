"""Files of finished runs, and studies that are killed and go on."""

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
from lab_policies import QUICK, keep_warm_starts, quick_study
from waiting import wait_until

from hpo_verl import cli
from hpo_verl.errors import ConfigError, DataError, EnvironmentCheckError
from hpo_verl.lab import study as study_module
from hpo_verl.lab import warm_start
from hpo_verl.lab.study import missing_cells, run_study
from hpo_verl.lab.trainer import Outcome
from hpo_verl.report.studies import read_results
from hpo_verl.runs.files import locked


def test_a_cache_whose_file_system_keeps_no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("hpo_verl.runs.files.fcntl.flock", refuse)
    with pytest.raises(EnvironmentCheckError, match=r"no locks \(ENOLCK: .*set HPO_VERL_CACHE"):
        warm_start.make(quick_study().cells()[0])


@pytest.fixture
def study():
    return quick_study()


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


def test_runs_that_were_measured_differently_do_not_share_a_folder(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "run_cell", outcome_of)
    run_study(study, tmp_path, 1, lambda cell, outcome: None)
    other = quick_study("rates", "evaluation.every=2")
    with pytest.raises(ConfigError, match=r"evaluation.every = 1 and 2.*--out"):
        missing_cells(other, tmp_path)
    # What a study crosses, it may.
    longer = quick_study("rates", "training.steps=3")
    assert missing_cells(longer, tmp_path) == longer.cells()


def test_two_studies_do_not_run_in_one_folder_at_once(study, tmp_path):
    with locked(tmp_path), pytest.raises(EnvironmentCheckError, match="--out"):
        run_study(study, tmp_path, 1, lambda cell, outcome: None)


@pytest.mark.timeout(300)
def test_a_killed_command_leaves_its_finished_cells_and_no_process(tmp_path):
    changes = ["seeds=1", "training.steps=8", "warm_start=0.05", "task=telelogs"]
    chosen = quick_study("tasks", *changes)
    keep_warm_starts(chosen)
    out = tmp_path / "runs"
    command = [
        sys.executable, "-c", "from hpo_verl.cli import main; main()", "lab", "run", "tasks",
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
    assert len(missing_cells(chosen, out)) == 4 - len(before)
    run_study(chosen, out, 1, lambda cell, outcome: None)
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(after) == 4
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "sparsty"], "did you mean sparsity"),
        (["run", "sparsity", "sede=1"], "did you mean seeds"),
        (["run", "sparsity", "--only", "grop"], "did you mean grpo"),
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
