"""vLLM's server on the CPU: runs that share a machine, and transfers of weights that fail.

`hpo-verl` with one rank and stock verl with two run at the same time, while a further run is
in the middle of a transfer. `make test-vllm` runs this file in an environment of its own.
"""

import contextlib
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zmq
from checkpoint_states import saved_weights
from real_runs import BIN, SMALL, STEPS, listening_addresses, read_metrics, run_processes, start
from safetensors.torch import load_file

from hpo_verl.runs.process import MARKER, SHARED_MEMORY
from hpo_verl.verl_plugin.rollout.weight_update import KEY

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOLERANCE = 1e-3
TESTS = Path(__file__).parents[1]
COMMAND = [BIN / "hpo-verl", "train"]
STOCK = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", TESTS.parent / "recipes"]
STOCK += ["--config-name"]
COMMON = [*SMALL, "actor_rollout_ref.rollout.name=vllm"]
COMMON += ["trainer.val_before_train=false", "trainer.test_freq=-1"]
RATE = "actor_rollout_ref.actor.optim.lr"
# Two policies, each of which moves by more than the tolerance at every step.
RUNS = {
    "one": [*COMMAND, "countdown-tiny", *COMMON, f"{RATE}=3e-3"],
    "two": [*STOCK, "countdown-tiny", *COMMON, f"{RATE}=2e-3", "trainer.n_gpus_per_node=2"],
}
# What becomes of the second update, the time limit, and what the run's error says. verl's
# receiver hides an error of its own worker behind one of its shared memory.
FAILURES = {
    "raise": (1e6, "the rollout server failed to take the weights: .*Worker failed with error"),
    "die": (1e6, "the rollout server failed to take the weights: "),
    "hang": (5, "the rollout server did not take a bucket of weights within 5 s"),
}


def sockets():
    return set(Path("/tmp").glob("rl-colocate-zmq-*"))  # noqa: S108


class OtherRun:
    """The sending end of a run of verl alone, in a Ray cluster of its own."""

    def __init__(self):
        self.file = Path("/tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock")  # noqa: S108
        assert not self.file.exists(), f"{self.file} is of another run, or was left by one"
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.bind(f"ipc://{self.file}")
        self.number = self.file.stat().st_ino

    def is_untouched(self):
        unanswered = not self.socket.poll(0, zmq.POLLOUT)
        return unanswered and self.file.exists() and self.file.stat().st_ino == self.number


@pytest.fixture(scope="module")
def other_run():
    run = OtherRun()
    yield run
    run.socket.close(linger=0)
    # ZeroMQ closes in a thread of its own, and may not come to it.
    run.file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


def mapped_by_stock_verl(cache):
    """Files in shared memory that belong to a run without our launcher.

    verl ends vLLM's processes so hard that the memory of their queues may stay behind.
    """
    names = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            stock = MARKER not in environment and environment.get("HPO_VERL_CACHE") == str(cache)
            if stock:
                names |= {Path(region.path).name for region in process.memory_maps()}
    return names & set(os.listdir(SHARED_MEMORY))


def run_all(commands, folder, cache):
    """Run commands at the same time to their ends; nothing of them may remain.

    Args:
        commands: by name, which is that of the run's folder too.
        folder: of all runs.
        cache: where their data are.

    Returns:
        Exit codes by name, and where the runs listened.
    """
    shared, files = set(os.listdir(SHARED_MEMORY)), sockets()
    processes, addresses, of_stock = {}, set(), set()
    for name, command in commands.items():
        with (folder / f"{name}.txt").open("w") as output:
            processes[name] = start(
                [*command, f"hydra.run.dir={folder}/{name}"],
                cache,
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
    while any(process.poll() is None for process in processes.values()):
        addresses |= listening_addresses(run_processes(cache))
        of_stock |= mapped_by_stock_verl(cache)
        time.sleep(1)
    assert run_processes(cache) == {}
    left = set(os.listdir(SHARED_MEMORY)) - shared
    for name in left & of_stock:
        (SHARED_MEMORY / name).unlink()
    assert left - of_stock == set()
    assert sockets() == files
    return {name: process.returncode for name, process in processes.items()}, addresses


@pytest.fixture(scope="module")
def addresses(other_run, folder, cache):
    """Where the two runs listened, which have both finished."""
    codes, addresses = run_all(RUNS, folder, cache)
    for name, code in codes.items():
        assert code == 0, (folder / f"{name}.txt").read_text()[-5000:]
    return addresses


@pytest.mark.parametrize("name", RUNS)
def test_the_server_samples_with_the_actors_weights_after_every_update(addresses, folder, name):
    metrics = read_metrics(folder / name)
    assert set(metrics) >= set(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        data = metrics[step]
        assert data["actor/grad_norm"] > 0
        # Mean log-probability of each response, and probability of each token.
        assert abs(data["rollout_corr/log_ppl_diff_max"]) < TOLERANCE, step
        assert abs(data["rollout_corr/log_ppl_diff_min"]) < TOLERANCE, step
        assert data["training/rollout_probs_diff_max"] < TOLERANCE, step
        # Already the step's second update sees another policy: weights that did not arrive,
        # or came from the run beside it, would be beyond the tolerance.
        moved = max(
            abs(math.log(data[f"hpo/ratio_{sign}"]))
            for sign in ("positive", "negative")
            if data[f"hpo/ratio_{sign}"] > 0
        )
        assert moved > TOLERANCE, (step, moved)


def test_a_run_of_verl_alone_keeps_its_socket(addresses, other_run):
    assert other_run.is_untouched()


def test_weights_moved(addresses, folder, cache):
    before = load_file(cache / "tiny-policy-countdown-0" / "model.safetensors")
    after = saved_weights(folder / "one", STEPS)
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() > 1e-4 for name in before)


def test_weights_travel_by_shared_memory_and_only_loopback_listens(addresses, folder):
    log = (folder / "one" / "train.log").read_text()
    assert "vLLMHttpServer" in log
    assert "Falling back to shared memory for weight transfer" in log
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failed_transfer_ends_the_run(how, folder, cache, monkeypatch):
    limit, message = FAILURES[how]
    helper, path = str(TESTS / "helpers" / "fail_update"), os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([helper, *([path] if path else [])]))
    monkeypatch.setenv("FAIL_UPDATE", how)
    command = [*COMMAND, "countdown-tiny", *COMMON, f"{KEY}={limit}"]
    codes, _ = run_all({how: command}, folder, cache)
    output = (folder / f"{how}.txt").read_text()
    assert codes == {how: 1}, output
    assert re.search(f"^error: .*{message}", output, re.MULTILINE), output
    if how == "raise":
        assert "RuntimeError: an error of this test" in (folder / how / "train.log").read_text()
