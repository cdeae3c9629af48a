"""Jobs on a real Ray cluster of two nodes: followed to success, to an error, and stopped."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ray_cluster import RayCluster
from real_runs import (
    BIN,
    SMALL,
    abandoned_memory,
    listening_addresses,
    read_metrics,
    repeatable,
    wait_for_step,
)
from waiting import wait_until

from hpo_verl import __version__
from hpo_verl.runs.process import SHARED_MEMORY
from hpo_verl.verl_plugin.engine.replay import load

REPOSITORY = Path(__file__).parents[2]
SPOIL = REPOSITORY / "tests" / "helpers" / "spoiled" / "spoil.py"
# One short step, without validation and checkpoint.
SHORTEST = [
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "trainer.total_training_steps=1",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster(trained, cache):
    cluster = RayCluster(cache, imported=SPOIL)
    yield cluster
    cluster.stop()


@pytest.fixture
def submit(cluster, cache, tmp_path):
    # torch's own store for the ranks would listen on all interfaces.
    store = f"file://{tmp_path}/process_group"
    loopback = f"+ray_kwargs.ray_init.runtime_env.env_vars.DIST_INIT_METHOD={store}"

    def submit(*arguments, command=(BIN / "hpo-verl", "submit", "countdown-tiny"), **variables):
        environment = {**os.environ, **cluster.token, "HPO_VERL_CACHE": str(cache), **variables}
        return subprocess.Popen(
            [*command, "--address", cluster.url, *arguments, loopback],
            env=environment,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return submit


def wait_until_idle(cluster):
    wait_until(lambda: not cluster.busy(), 60, cluster.busy)


def test_a_job_trains_bit_for_bit_like_a_run_of_its_own(submit, cluster, trained, tmp_path):
    folder = tmp_path / "run"
    job = submit(*SMALL, f"hydra.run.dir={folder}")
    addresses = set()
    while job.poll() is None:
        addresses |= listening_addresses({p.pid: p for p in cluster.processes()})
        time.sleep(1)
    output, errors = job.communicate()
    assert job.returncode == 0, output + errors
    warning, first, *_ = output.splitlines()
    assert warning.startswith("warning: paths: all are absolute; whether all machines share")
    assert first.startswith("job: raysubmit_")
    assert "success on held-out prompts:" in output
    assert repeatable(read_metrics(folder)) == repeatable(read_metrics(trained.folder))
    for name in ("summary.json", "curve.png", "policy/model.safetensors"):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").glob("events.*"))
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    wait_until_idle(cluster)


def test_the_cluster_lacks_the_package(cluster, tmp_path):
    for code in ("import hpo_verl", "from importlib.metadata import version; version('hpo-verl')"):
        done = subprocess.run(
            [cluster.python, "-c", code],
            env=cluster.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "NotFoundError: " in done.stderr


@pytest.mark.slow
def test_an_update_with_a_nan_is_skipped_and_recorded(submit, cluster, tmp_path):
    folder = tmp_path / "run"
    # Two updates a step, of which the third is spoiled.
    spoiled = "+ray_kwargs.ray_init.runtime_env.env_vars.SPOILED_UPDATES=3-3"
    job = submit(*SMALL, "trainer.val_before_train=false", f"hydra.run.dir={folder}", spoiled)
    output, errors = job.communicate()
    assert job.returncode == 0, output + errors
    metrics = read_metrics(folder)
    assert [metrics[step]["hpo/updates_not_finite"] for step in (1, 2, 3)] == [0, 1, 0]
    file = folder / "not_finite_0001_rank0.pt"
    assert load(file)["versions"]["hpo-verl"] == __version__
    wait_until_idle(cluster)


@pytest.mark.slow
def test_a_workers_error_comes_last_with_the_log(submit, cluster, tmp_path):
    folder = tmp_path / "run"
    job = submit(
        *SHORTEST,
        f"hydra.run.dir={folder}",
        "trainer.guard.max_not_finite_in_a_row=1",
        "+ray_kwargs.ray_init.runtime_env.env_vars.SPOILED_UPDATES=1-1",
    )
    _, errors = job.communicate()
    assert job.returncode == 1, errors
    *_, error, path = errors.strip().splitlines()
    assert "NotFiniteError" in error
    assert "the last: micro-batch 0: log_prob: 1 of " in error
    assert path == f"full output: {folder}/train.log"
    # The workers had the uploaded code, not a copy that happens to be installed.
    raised = [line for line in (folder / "train.log").open() if "engine/step_guard.py" in line]
    assert raised
    assert all("/runtime_resources/working_dir_files/" in line for line in raised)
    wait_until_idle(cluster)


@pytest.mark.slow
def test_ctrl_c_stops_the_job_and_leaves_nothing(submit, cluster, tmp_path):
    folder = tmp_path / "run"
    shared_memory = set(os.listdir(SHARED_MEMORY))
    job = submit(*SHORTEST, f"hydra.run.dir={folder}", "trainer.total_training_steps=500")
    wait_for_step(folder, 1, job)
    assert cluster.busy()
    job.send_signal(signal.SIGINT)
    output, errors = job.communicate(timeout=120)
    assert job.returncode == 130, output + errors
    assert "stopping raysubmit_" in output
    wait_until_idle(cluster)
    assert abandoned_memory(shared_memory) == set()
    assert not list((cluster.folder / "tmp").glob("hpo-*"))


@pytest.mark.slow
def test_plain_ray_runs_stock_verl(submit, cluster, tmp_path):
    folder = tmp_path / "run"
    job = submit(
        *("--working-dir", REPOSITORY),
        *("--runtime-env", REPOSITORY / "recipes" / "ray" / "runtime_env.yaml", "--"),
        *("python", "-m", "verl.trainer.main_ppo"),
        *("--config-dir", "recipes", "--config-name", "countdown-tiny"),
        *SHORTEST,
        f"hydra.run.dir={folder}",
        command=(BIN / "ray", "job", "submit"),
    )
    output, errors = job.communicate()
    assert job.returncode == 0, output + errors
    assert 0 < read_metrics(folder)[1]["hpo/alpha"] <= 1
    wait_until_idle(cluster)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        # Seen here, before and after the cluster was asked.
        (["algo=grpoo"], {}, "did you mean grpo"),
        ([], {"RAY_AUTH_MODE": "disabled"}, "the cluster asks for its token"),
        (["trainer.n_gpus_per_node=2"], {}, "trainer.n_gpus_per_node=2: this cluster has "),
        # Seen by the job.
        (["data.train_files=/nowhere.parquet"], {}, "/nowhere.parquet does not exist"),
    ],
)
def test_wrong_input_ends_with_code_2(submit, tmp_path, arguments, variables, message):
    job = submit(f"hydra.run.dir={tmp_path}/run", *arguments, **variables)
    _, errors = job.communicate()
    assert job.returncode == 2, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "run").exists()


def test_nothing_of_the_cluster_is_left(cluster):
    assert cluster.stop() == []
