"""The real trainer, end to end on the CPU: `hpo-verl train` and stock verl."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from hpo_verl.launch.process import MARKER, SHARED_MEMORY

BIN = Path(sys.executable).parent
STEPS = 3
SMALL = [
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=128",
    f"trainer.total_training_steps={STEPS}",
    f"trainer.save_freq={STEPS}",
    f"trainer.test_freq={STEPS}",
]
# Wall-clock time and memory differ between any two runs.
NOT_REPEATABLE = ("timing", "perf/", "actor/perf/", "mfu")

pytestmark = pytest.mark.timeout(900)


def start(command, cache, **options):
    environment = {**os.environ, "HPO_VERL_CACHE": str(cache), "RAY_worker_niceness": "0"}
    return subprocess.Popen(command, env=environment, text=True, **options)


def read_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["data"] for row in map(json.loads, lines)}


def repeatable(metrics):
    return {
        step: {key: value for key, value in data.items() if not key.startswith(NOT_REPEATABLE)}
        for step, data in metrics.items()
    }


def run_processes():
    """Processes of any run of ours, found by the marker that they inherit."""
    found = {}
    for process in psutil.process_iter():
        try:
            marker = process.environ().get(MARKER)
        except (psutil.Error, OSError):
            continue
        if marker and process.status() != psutil.STATUS_ZOMBIE:
            found[process.pid] = process
    return found


def listening_addresses(processes):
    addresses = set()
    for process in processes.values():
        try:
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return addresses


def wait_for_step(folder, step, process, seconds=240):
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        file = folder / "metrics.jsonl"
        if file.exists() and any(f'"step":{step},' in line for line in file.open()):
            return
        time.sleep(0.3)


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """One finished run of the command, and the addresses that its processes listened on."""
    folder = tmp_path_factory.mktemp("run") / "a_hpo"
    shared_memory = set(os.listdir(SHARED_MEMORY))
    before = run_processes()
    process = start(
        [BIN / "hpo-verl", "train", "countdown-tiny", *SMALL, f"hydra.run.dir={folder}"],
        cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    addresses = set()
    while process.poll() is None:
        addresses |= listening_addresses(run_processes())
        time.sleep(1)
    output = process.stdout.read()
    assert process.returncode == 0, output
    assert set(run_processes()) - set(before) == set()
    assert set(os.listdir(SHARED_MEMORY)) - shared_memory == set()
    return folder, output, addresses


def test_last_lines_tell_what_was_reached_and_where_it_is(trained):
    folder, output, _ = trained
    lines = output.strip().splitlines()
    assert "success on held-out puzzles:" in lines[-4]
    assert lines[-3] == f"picture: {folder}/curve.png"
    assert lines[-2].split() == ["policy:", f"{folder}/policy"]
    assert lines[-1].startswith("a longer run: hpo-verl train countdown-tiny")


def test_run_folder_holds_everything(trained):
    folder, _, _ = trained
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "checkpoints" / f"global_step_{STEPS}").is_dir()
    for name in ("config.yaml", "train.log", "curve.png", "policy/config.json"):
        assert (folder / name).is_file(), name
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {
        "algorithm",
        "steps",
        "seconds",
        "success_before",
        "success_after",
        "versions",
        "seed",
    }
    assert (summary["algorithm"], summary["steps"], summary["seed"]) == ("a_hpo", STEPS, 0)
    assert 0 <= summary["success_before"] <= 1
    assert summary["versions"]["verl"] == "0.9.1"


def test_alpha_and_signs_are_logged_on_every_step(trained):
    folder, _, _ = trained
    metrics = read_metrics(folder)
    for step in range(1, STEPS + 1):
        data = metrics[step]
        positives, negatives = data["hpo/positive_fraction"], data["hpo/negative_fraction"]
        expected = min(1.0, max(0.1, positives / negatives)) if negatives else 1.0
        assert data["hpo/alpha"] == pytest.approx(expected, rel=1e-6)


def test_weights_moved_and_the_server_has_them(trained, cache):
    folder, _, _ = trained
    before = load_file(cache / "tiny-policy-0" / "model.safetensors")
    after = load_file(folder / "policy" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any((before[name] - after[name]).abs().max() > 1e-5 for name in before)
    # From step 2 on, a server without the new weights would disagree with the actor.
    for step, data in read_metrics(folder).items():
        if step:
            assert data["training/rollout_probs_diff_max"] < 1e-3
            assert data["actor/grad_norm"] > 0


def test_only_loopback_listens(trained):
    _, _, addresses = trained
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_stock_verl_repeats_the_run_bit_for_bit(trained, cache, tmp_path):
    folder, _, _ = trained
    again = tmp_path / "stock"
    recipes = Path(__file__).parents[2] / "recipes"
    process = start(
        [
            *(sys.executable, "-m", "verl.trainer.main_ppo"),
            *("--config-dir", recipes, "--config-name", "countdown-tiny"),
            *SMALL,
            f"hydra.run.dir={again}",
        ],
        cache,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.wait() == 0
    first, second = repeatable(read_metrics(folder)), repeatable(read_metrics(again))
    assert first == second
    saved = f"checkpoints/global_step_{STEPS}/actor/huggingface/model.safetensors"
    assert (folder / saved).read_bytes() == (again / saved).read_bytes()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_run_leaves_no_process(trained, cache, tmp_path, how):
    folder = tmp_path / "run"
    shared_memory = set(os.listdir(SHARED_MEMORY))
    before = run_processes()
    process = start(
        [
            *(BIN / "hpo-verl", "train", "countdown-tiny", *SMALL, f"hydra.run.dir={folder}"),
            *("algo=grpo", "trainer.total_training_steps=500", "trainer.val_before_train=false"),
        ],
        cache,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(folder, 1, process)
    process.send_signal(how)
    code = process.wait(60)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while set(run_processes()) - set(before):
        assert time.monotonic() < deadline, run_processes()
        time.sleep(0.5)
    assert set(os.listdir(SHARED_MEMORY)) - shared_memory == set()


def test_stock_verl_names_the_command_for_missing_data(tmp_path):
    process = start(
        [
            *(sys.executable, "-m", "verl.trainer.main_ppo"),
            *("--config-dir", Path(__file__).parents[2] / "recipes"),
            *("--config-name", "countdown-tiny", f"hydra.run.dir={tmp_path}/run"),
        ],
        tmp_path / "empty",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "make it with: python -m data_prep.countdown" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["countdown-tiniest"], "unknown recipe"),
        (["countdown-tiny", "algo=grpoo"], "did you mean grpo"),
        (["countdown-tiny", "algorithm.hpo.alpha_min=1.5"], r"algorithm.hpo.alpha_min"),
        (["countdown-tiny", "actor_rollout_ref.rollout.n=0"], "rollout.n=0: must be an integer"),
        (
            ["countdown-tiny", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"],
            "loss_agg_mode",
        ),
        (
            ["countdown-tiny", "data.train_files=/nowhere.parquet"],
            "/nowhere.parquet does not exist",
        ),
        (["countdown-tiny", "hydra.run.dir=/proc/run"], "run folder /proc/run"),
    ],
)
def test_wrong_input_ends_with_code_2_and_one_line_within_15_seconds(
    trained, cache, arguments, message
):
    started = time.monotonic()
    process = start(
        [BIN / "hpo-verl", "train", *arguments],
        cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 15
    assert process.returncode == 2, errors
    assert len(errors.strip().splitlines()) == 1
    assert message in errors
    assert "run folder" not in output
