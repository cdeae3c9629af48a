"""The real trainer, end to end on the CPU: `hpo-verl train` and stock verl."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_states import plain, saved_weights
from real_runs import (
    BIN,
    SMALL,
    STEPS,
    abandoned_memory,
    read_metrics,
    repeatable,
    run_processes,
    start,
    wait_for_step,
)
from safetensors.torch import load_file
from waiting import wait_until

from hpo_verl.runs.process import SHARED_MEMORY

FORBID = Path(__file__).parents[1] / "helpers" / "forbid"

pytestmark = pytest.mark.timeout(900)


def test_last_lines_tell_what_was_reached_and_where_it_is(trained):
    folder = trained.folder
    lines = trained.watched.output.strip().splitlines()
    assert "success on held-out prompts:" in lines[-4]
    assert lines[-3] == f"picture: {folder}/curve.png"
    assert lines[-2].split() == ["policy:", f"{folder}/policy"]
    assert lines[-1].startswith("a longer run: hpo-verl train countdown-tiny")


def test_run_folder_holds_everything(trained):
    folder = trained.folder
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
        "pass_at_k",
        "validated_on",
        "versions",
        "seed",
    }
    assert (summary["algorithm"], summary["steps"], summary["seed"]) == ("a_hpo", STEPS, 0)
    assert 0 <= summary["success_before"] <= 1
    # One response a prompt is validated.
    assert summary["pass_at_k"] == {}
    assert summary["versions"]["verl"] == "0.9.1"


def test_alpha_and_signs_are_logged_on_every_step(trained):
    metrics = read_metrics(trained.folder)
    for step in range(1, STEPS + 1):
        data = metrics[step]
        positives, negatives = data["hpo/positive_fraction"], data["hpo/negative_fraction"]
        expected = min(1.0, max(0.1, positives / negatives)) if negatives else 1.0
        assert data["hpo/alpha"] == pytest.approx(expected, rel=1e-6)


def test_weights_moved_and_the_server_has_them(trained, cache):
    folder = trained.folder
    before = load_file(cache / "tiny-policy-countdown-0" / "model.safetensors")
    after = saved_weights(folder, STEPS)
    assert before.keys() == after.keys()
    assert any((before[name] - after[name]).abs().max() > 1e-5 for name in before)
    policy = load_file(folder / "policy" / "model.safetensors")
    assert all(torch.equal(policy[name], after[name].bfloat16()) for name in before)
    # From step 2 on, a server without the new weights would disagree with the actor.
    for step, data in read_metrics(folder).items():
        if step:
            assert data["training/rollout_probs_diff_max"] < 1e-3
            assert data["actor/grad_norm"] > 0


def test_only_loopback_listens(trained):
    assert trained.watched.addresses
    assert trained.watched.addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_run_takes_less_than_8_gibibytes(trained):
    assert 2**30 < trained.watched.peak_memory < 8 * 2**30


def test_stock_verl_beside_it_repeats_the_run_bit_for_bit(trained):
    first, second = read_metrics(trained.folder), read_metrics(trained.beside)
    assert repeatable(first) == repeatable(second)
    assert plain(saved_weights(trained.folder, STEPS)) == plain(
        saved_weights(trained.beside, STEPS)
    )


@pytest.mark.parametrize(
    ("recipe", "how"),
    [
        ("telelogs-tiny", signal.SIGINT),
        pytest.param("countdown-tiny", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_an_ended_run_leaves_no_process(trained, cache, tmp_path, recipe, how):
    folder = tmp_path / "run"
    shared_memory = set(os.listdir(SHARED_MEMORY))
    process = start(
        [
            *(BIN / "hpo-verl", "train", recipe, *SMALL, f"hydra.run.dir={folder}"),
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
    wait_until(lambda: not run_processes(cache), 60, lambda: run_processes(cache))
    assert abandoned_memory(shared_memory) == set()


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
    assert "hpo-verl prepare countdown-tiny" in errors.splitlines()[-1]


def refused(arguments, cache, folder, **variables):
    """The one line with which `train` refuses; nothing is left, so Ray was not started."""
    process = start(
        [BIN / "hpo-verl", "train", *arguments],
        cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        variables=variables,
    )
    output, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "run folder" not in output
    assert list(folder.iterdir()) == []
    (line,) = errors.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["countdown-tiniest"], "unknown recipe"),
        (["countdown-tiny", "algo=grpoo"], "did you mean grpo"),
        (["countdown-tiny", "actor_rollout_ref.rollout.n=0"], "rollout.n=0: must be an integer"),
        (["countdown-tiny", "hydra.run.dir=/proc/run"], "run folder /proc/run"),
    ],
)
def test_what_needs_no_verl_is_refused_without_torch_and_ray(
    trained, cache, tmp_path, arguments, message
):
    forbidden = {"PYTHONPATH": str(FORBID), "FORBID": "torch ray"}
    assert message in refused(arguments, cache, tmp_path, **forbidden)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["countdown-tiny", "algorithm.hpo.alpha_min=1.5"], r"algorithm.hpo.alpha_min"),
        (
            ["countdown-tiny", "data.train_files=/nowhere.parquet"],
            "/nowhere.parquet does not exist",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_ray(
    trained, cache, tmp_path, arguments, message
):
    assert message in refused(arguments, cache, tmp_path)
