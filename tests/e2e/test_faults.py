"""A process of a real run is killed, or does nothing any more, and what becomes of the run."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from real_runs import BIN, read_metrics, shared_memory, start, wait_for_step

from hpo_verl.runs.checkpoints import SEAL, step_of
from hpo_verl.runs.process import MARKER, marked_processes

pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]

SMALLEST = [
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.total_training_steps=1000",
]
# Title of a process, and how the message calls it.
ACTOR_WORKER = ("ray::WorkerDict", r"the actor worker \(WorkerDict, process {pid} on [\d.]+\) died")
ROLLOUT_SERVER = ("ray::HFServer", r"the rollout server \(HFServer, process {pid} on [\d.]+\) died")
REWARD_WORKER = (
    "ray::RewardLoopWorker",
    r"the reward worker \(RewardLoopWorker, process {pid} on [\d.]+\) died",
)
RAY_NODE = ("raylet", r"the Ray node [\d.]+ died")
SCORING_PROCESS = "hpo_verl.rewards.scoring_process"


class Run:
    """A run with a folder for temporary files of its own."""

    def __init__(self, cache, folder, *overrides):
        self.folder = folder
        # Short: a socket's path has at most 107 bytes.
        self.temporary = Path(tempfile.mkdtemp(prefix="t-"))
        command = [BIN / "hpo-verl", "train", "countdown-tiny", *SMALLEST, *overrides]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(self.temporary))
            self.launcher = start(
                [*command, f"hydra.run.dir={folder}"],
                cache,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )

    def wait_until_it_trains(self):
        wait_for_step(self.folder, 2, self.launcher, seconds=600)
        (main,) = psutil.Process(self.launcher.pid).children()
        self.marker = main.environ()[MARKER]
        # Not all of the machine's: another run beside this one has its own.
        self.shared = {file for process in self.processes() for file in shared_memory(process)}
        assert self.shared

    def processes(self):
        return marked_processes(self.marker)

    def find(self, name):
        (found,) = [p for p in self.processes() if is_named(p, name)]
        return found

    def steps(self):
        return len((self.folder / "metrics.jsonl").read_text().splitlines())

    def wait_for_steps(self, further):
        wait_for_step(self.folder, self.steps() + further, self.launcher)

    def last_checkpoint(self):
        """The newest that is complete; verl's tracker may be one ahead."""
        seals = (self.folder / "checkpoints").glob(f"global_step_*/{SEAL}")
        return max((seal.parent for seal in seals), key=step_of)

    def end(self):
        """Wait for the end; return exit code and output. Nothing may be left."""
        output, _ = self.launcher.communicate(timeout=300)
        print(f"ended with {self.launcher.returncode}:\n{output}")
        assert self.processes() == []
        # torch's cache, one for all that a user runs, is made where torch is imported.
        assert all(name.startswith("torchinductor_") for name in os.listdir(self.temporary))
        assert not [file for file in self.shared if Path(file).exists()]
        assert not (self.folder / ".stop").exists()
        assert not (self.folder / ".stage").exists()
        return self.launcher.returncode, output

    def clean(self):
        while self.launcher.poll() is None:
            self.launcher.terminate()
            time.sleep(1)
        shutil.rmtree(self.temporary)


@pytest.fixture
def start_run(cache, tmp_path):
    started = []

    def start_run(*overrides):
        started.append(Run(cache, tmp_path / "run", *overrides))
        started[0].wait_until_it_trains()
        return started[0]

    yield start_run
    for run in started:
        run.clean()


def is_named(process, name):
    """Whether it is Ray's actor, the module or the program of this name."""
    first, *others = [*process.cmdline(), ""]
    return name in others or f"{Path(first.split(' ')[0]).name}.".startswith(f"{name}.")


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(
    "role", [ACTOR_WORKER, ROLLOUT_SERVER, REWARD_WORKER, RAY_NODE], ids=lambda role: role[0]
)
def test_a_killed_process_ends_the_run_and_is_named(start_run, role):
    name, shown = role
    run = start_run("trainer.save_freq=1")
    process = run.find(name)
    checkpoint = run.last_checkpoint()
    saved = digests(checkpoint)
    assert saved
    process.kill()
    code, output = run.end()
    assert code == 1
    error = output[output.index("error: ") :]
    assert re.search(shown.format(pid=process.pid), error.splitlines()[0]), error
    assert error.splitlines()[-1] == f"full output: {run.folder}/train.log"
    assert digests(checkpoint) == saved


def test_a_run_without_progress_ends_and_says_what_it_was_doing(start_run):
    run = start_run("trainer.save_freq=1", "trainer.guard.max_seconds_without_progress=60")
    # It does nothing any more, and nobody sees it die.
    run.find("ray::HFServer").suspend()
    code, output = run.end()
    assert code == 1
    assert re.search(
        r"error: the run made no progress for 60 s while it was 'step \d+: (sampling|sending .*)'; "
        r"trainer\.guard\.max_seconds_without_progress=60 permits no more",
        output,
    ), output


def test_a_lost_scoring_process_is_replaced_and_ctrl_c_saves(start_run):
    run = start_run("trainer.save_freq=100000")
    for how in (signal.SIGKILL, signal.SIGSTOP):
        process = run.find(SCORING_PROCESS)
        process.send_signal(how)
        run.wait_for_steps(2)
        assert run.find(SCORING_PROCESS).pid != process.pid
    errors = [data["reward/error_fraction"] for data in read_metrics(run.folder).values()]
    # One response each: that of the call which found the process gone.
    assert sorted(errors)[-2:] == [1 / 32, 1 / 32]
    assert sum(errors) == 2 / 32

    assert not list((run.folder / "checkpoints").glob("global_step_*"))
    run.launcher.send_signal(signal.SIGINT)
    code, output = run.end()
    assert code == 130
    *_, stopped, command = output.splitlines()
    checkpoint = run.last_checkpoint()
    step = checkpoint.name.removeprefix("global_step_")
    assert stopped == f"stopped after step {step}; checkpoint: {checkpoint}"
    assert command.startswith("go on with: hpo-verl train countdown-tiny --resume ")
    assert command.endswith(f" hydra.run.dir={run.folder}")
    assert max(read_metrics(run.folder)) == int(step)
    assert digests(checkpoint)["data.pt"]


def test_a_second_signal_ends_the_run_at_once(start_run):
    run = start_run("trainer.save_freq=100000")
    # A step that would not end: its rollout server does nothing.
    run.find("ray::HFServer").suspend()
    run.launcher.send_signal(signal.SIGINT)
    time.sleep(3)
    assert run.launcher.poll() is None
    run.launcher.send_signal(signal.SIGTERM)
    code, output = run.end()
    assert code == 130
    assert output.splitlines()[-1] == "error: interrupted"
    assert "stopping after this step, with a checkpoint; Ctrl-C again: at once" in output
