"""SIGKILL for a whole run at named points; what goes on ends as if nothing had happened.

One run is killed seven times, at the points of `kill_at/sitecustomize.py`, and goes on
each time; every checkpoint on the way, and all metrics, equal those of a run that nobody
disturbed. An epoch has three steps, so three of the starts are at an epoch's end.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest
from checkpoint_states import different_files
from real_runs import BIN, repeatable, run_processes, start
from waiting import wait_until

from hpo_verl.runs import checkpoints, process
from hpo_verl.runs.metrics import MetricsFile

STEPS = 9
SETTINGS = [
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "data.train_max_samples=48",
    f"trainer.total_training_steps={STEPS}",
    "trainer.save_freq=1",
    "trainer.test_freq=3",
]
KILLS = {
    "backward": 2,
    "rollout": 4,
    "shards": 5,
    "before_tracker": 6,
    "tracker": 7,
    "metrics": 7,
    "seal": 8,
}

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]


@pytest.fixture(autouse=True)
def temporary_files(monkeypatch):
    """A killed run cannot remove its temporary files; Ray's sockets need a short path."""
    folder = tempfile.mkdtemp(prefix="k-")
    monkeypatch.setenv("TMPDIR", folder)
    shared = process._shared_memory_files()
    yield folder
    shutil.rmtree(folder)
    process.remove_shared_memory(process._shared_memory_files() - shared)


def train(cache, folder, *arguments):
    """Exit code and output of a start of the run."""
    command = [BIN / "hpo-verl", "train", "countdown-tiny", *SETTINGS, f"hydra.run.dir={folder}"]
    run = start([*command, *arguments], cache, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = run.communicate()
    return run.returncode, output


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = train(cache, folder)
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the run that is killed again and again."""
    return tmp_path_factory.mktemp("killed") / "run"


def alive(cache, temporary):
    """Processes of a run with these temporary files."""
    found = []
    for running in run_processes(cache).values():
        with contextlib.suppress(psutil.Error):
            if running.environ().get("TMPDIR", "").startswith(temporary):
                found.append(running)
    return found


def wait_for_end(cache, temporary):
    """SIGKILL takes a moment."""
    wait_until(lambda: not alive(cache, temporary), 60, lambda: alive(cache, temporary))


def go_on(folder):
    return ["--resume"] if (folder / "metrics.jsonl").exists() else []


def assert_as_undisturbed(folder, undisturbed, last):
    """The checkpoints, and the metrics up to the last one, are those of the other run."""
    for step in range(1, last + 1):
        name = f"checkpoints/global_step_{step}"
        assert different_files(folder / name, undisturbed / name) == set(), name
    got, expected = (
        [row for row in MetricsFile(run / "metrics.jsonl").read_new() if row[0] <= last]
        for run in (folder, undisturbed)
    )
    assert [step for step, _ in got] == list(range(last + 1))
    assert repeatable(dict(got)) == repeatable(dict(expected))


def assert_killed_there(point, folder, step):
    """What lies in the folder can only be left by a kill at this point."""
    partial = folder / "checkpoints" / f"global_step_{step}"
    shard = "actor/optim_world_size_1_rank_0.pt"
    before = folder / "checkpoints" / f"global_step_{step - 1}"
    tracker = (folder / "checkpoints" / checkpoints.TRACKER).read_text()
    if point in ("backward", "rollout"):
        assert not partial.exists()
        return
    assert not (partial / checkpoints.SEAL).exists()
    torn = (partial / shard).stat().st_size < (before / shard).stat().st_size
    assert torn == (point == "shards")
    assert (partial / checkpoints.DATA_ORDER).exists() == (point != "shards")
    assert tracker == {"shards": str(step - 1), "before_tracker": str(step - 1), "tracker": ""}.get(
        point, str(step)
    )
    rows = (folder / "metrics.jsonl").read_bytes()
    assert rows.endswith(b"\n") == (point != "metrics")
    assert (b'"step":%d,' % step in rows) == (point in ("metrics", "seal"))
    assert (partial / f".{checkpoints.SEAL}.partial").exists() == (point == "seal")


@pytest.mark.parametrize("point", KILLS)
def test_a_run_killed_at(point, cache, folder, undisturbed, monkeypatch, temporary_files):
    step = KILLS[point]
    helper = Path(__file__).parents[1] / "helpers" / "kill_at"
    monkeypatch.setenv("KILL_AT", f"{point}:{step}")
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(helper), *([path] if path else [])]))
    code, output = train(cache, folder, *go_on(folder))
    assert code == -signal.SIGKILL, output
    wait_for_end(cache, temporary_files)
    assert_killed_there(point, folder, step)
    chosen = checkpoints.choose(folder / "checkpoints")
    assert chosen.step == step - 1
    assert len(chosen.left_out) == (point not in ("backward", "rollout"))
    assert_as_undisturbed(folder, undisturbed, step - 1)


def test_it_ends_as_if_nothing_had_happened(cache, folder, undisturbed):
    code, output = train(cache, folder, *go_on(folder))
    assert code == 0, output
    assert_as_undisturbed(folder, undisturbed, STEPS)
    assert (folder / "metrics.jsonl").read_bytes().count(b"\n") == STEPS + 1
    weights = "policy/model.safetensors"
    assert (folder / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_a_full_disk_ends_the_run_with_its_name_and_a_whole_checkpoint(cache, tmp_path):
    small, left = tmp_path / "small", tmp_path / "left"
    small.mkdir()
    # The checks ask for a large disk. It shrinks at the first checkpoint: two of 2.0 MB fit then.
    # The mount is gone with the shell, so what it holds is copied.
    shrink = 'until [ -e "$0"/global_step_1 ]; do sleep 0.1; done; mount -o remount,size=5m "$0"'
    mount = f'mount -t tmpfs -o size=2g none "$0" || exit 99; ({shrink}) & left="$1"; shift; "$@"'
    shell = ["unshare", "-rm", "sh", "-c", f'{mount}; code=$?; cp -r "$0" "$left"; exit $code']
    run = start(
        [
            *(*shell, small, left, BIN / "hpo-verl", "train", "countdown-tiny", *SETTINGS),
            *("trainer.val_before_train=false", f"trainer.default_local_dir={small}"),
            f"hydra.run.dir={tmp_path}/run",
        ],
        cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = run.communicate()
    if not left.exists():
        pytest.skip(f"no private tmpfs: {output}")
    assert run.returncode == 1, output
    assert f"{small}: the disk is full, so global_step_3 was not saved" in output
    chosen = checkpoints.choose(left)
    assert (chosen.step, chosen.left_out) == (2, ())
