"""A NaN inside the model during a real run: skipped once, and the end of the run if it stays."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from real_runs import BIN, SMALL, STEPS, read_metrics, start

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

SPOILED = Path(__file__).parents[1] / "helpers" / "spoiled"


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """Folder, output and exit code of a run spoiled once, and of one that stays spoiled."""
    place = tmp_path_factory.mktemp("not_finite")
    processes = {}
    # Two updates a step.
    for name, updates in (("once", "3-3"), ("always", "3-99")):
        environment = {
            "PYTHONPATH": f"{SPOILED}:{os.environ.get('PYTHONPATH', '')}",
            "VERL_USE_EXTERNAL_MODULES": "spoil",
            "SPOILED_UPDATES": updates,
        }
        words = ["env", *(f"{key}={value}" for key, value in environment.items())]
        with (place / f"{name}.txt").open("w") as output:
            processes[name] = start(
                [
                    *words,
                    *(BIN / "hpo-verl", "train", "countdown-tiny", *SMALL),
                    *("trainer.val_before_train=false", "trainer.save_freq=-1"),
                    *("trainer.test_freq=-1", f"hydra.run.dir={place}/{name}"),
                ],
                cache,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
    codes = {name: process.wait() for name, process in processes.items()}
    return {
        name: (place / name, (place / f"{name}.txt").read_text(), codes[name]) for name in codes
    }


def test_one_update_is_skipped_and_counted_and_the_run_goes_on(runs):
    folder, output, code = runs["once"]
    assert code == 0, output
    metrics = read_metrics(folder)
    assert set(metrics) == set(range(1, STEPS + 1))
    assert [metrics[step]["hpo/updates_not_finite"] for step in (1, 2, 3)] == [0, 1, 0]
    assert [metrics[step]["hpo/updates_without_advantage"] for step in (1, 2, 3)] == [0, 0, 0]
    # Means of the other update alone.
    assert all(0 < metrics[step]["actor/grad_norm"] < 100 for step in (1, 2, 3))
    assert [file.name for file in folder.glob("not_finite_*")] == ["not_finite_0001_rank0.pt"]


def test_the_batch_of_the_run_is_replayed(runs):
    folder, _, _ = runs["once"]
    command = [BIN / "hpo-verl", "replay", folder / "not_finite_0001_rank0.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ": loss hpo, token-mean" in done.stdout
    assert re.search(r"^first not finite: micro-batch 0: log_prob: 1 of ", done.stdout, re.M)


def test_three_in_a_row_end_the_run_with_the_tensor_and_the_file(runs):
    folder, output, code = runs["always"]
    assert code == 1
    # Updates 3 and 4 are those of step 2; with update 5 it is enough.
    assert set(read_metrics(folder)) == {1, 2}
    path = folder / "not_finite_0003_rank0.pt"
    assert path.exists()
    assert "NotFiniteError: 3 updates in a row were not finite" in output
    assert "the last: micro-batch 0: log_prob: 1 of " in output
    assert f"mini-batch: {path}; see hpo-verl replay" in output
