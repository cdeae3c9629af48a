"""verl's main program as the launcher starts it: why a run failed, and what Ray records."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
import ray

from hpo_verl.verl_plugin import main as program

# The main program around a stand-in of verl's, with a Ray of its own.
RUN = """
import json, os, signal, sys, time
import ray
from verl.trainer import main_ppo
from hpo_verl.verl_plugin import main as program

program.LOOK_SECONDS, program.GRACE_SECONDS = 0.2, 1.0

def make():
    class WorkerDict(Base):
        pass
    return WorkerDict

class Base:
    def pid(self):
        return os.getpid()
    def leave(self):
        ray.actor.exit_actor()
    def fail(self):
        raise KeyError("no groups")

def run():
    assert sys.argv[1:] == ["a=1", "b c"], sys.argv
    assert sys.stdin.read() == ""
    ray.init(num_cpus=4, include_dashboard=False, _temp_dir=os.environ["RAY_FOLDER"])
    kind = ray.remote(make())
    actor = kind.remote()
    pid = ray.get(actor.pid.remote())
    print("PID", pid, flush=True)
    ACT

main_ppo.main = run
program.main()
"""


@pytest.fixture
def run(tmp_path):
    def run(act, sent='["a=1", "b c"]\n'):
        failure = tmp_path / "failure"
        text = RUN.replace("ACT", act.replace("\n", "\n    "))
        # Short, since Ray puts sockets below it.
        with tempfile.TemporaryDirectory(prefix="hpo-") as folder:
            done = subprocess.run(
                [sys.executable, "-c", text],
                input=sent,
                capture_output=True,
                text=True,
                timeout=300,
                env={
                    **os.environ,
                    "HPO_VERL_FAILURE": str(failure),
                    "RAY_FOLDER": folder,
                    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                    "VERL_PLATFORM": "cpu",
                },
            )
        print(done.stdout, done.stderr)
        pid = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("PID ")]
        said = failure.read_text().replace(pid[0], "PID") if failure.exists() else None
        return done.returncode, said, done.stderr

    return run


def test_without_arguments_it_ends_in_silence(run):
    assert run("", sent="")[:2] == (0, None)


def test_an_end_that_the_run_asked_for_is_no_death(run):
    act = (
        "other = kind.remote(); ray.get(other.pid.remote()); ray.kill(actor); del other\n"
        "time.sleep(3)"
    )
    code, said, errors = run(act)
    assert (code, said) == (0, None), errors


def test_the_exception_of_a_worker_is_the_reason(run):
    code, said, _ = run("ray.get(actor.fail.remote())")
    assert code == 1
    assert said == "KeyError: 'no groups'"


def test_a_death_is_named_before_the_exception_that_follows(run):
    code, said, _ = run(
        "os.kill(pid, signal.SIGKILL)\n"
        "try:\n    ray.get(actor.pid.remote())\n"
        "except ray.exceptions.RayActorError: raise RuntimeError('the step failed')"
    )
    assert code == 1
    assert said.startswith("the actor worker (WorkerDict, process PID on 127.0.0.1) died (")
    assert said.endswith("; RuntimeError: the step failed")


@pytest.mark.slow
def test_an_exception_about_a_dead_actor_adds_nothing(run):
    code, said, _ = run("os.kill(pid, signal.SIGKILL); ray.get(actor.pid.remote())")
    assert code == 1
    assert said.startswith("the actor worker (WorkerDict, process PID on 127.0.0.1) died (")
    assert "ActorDiedError" not in said


def test_a_run_that_goes_on_after_a_death_is_ended(run):
    code, said, errors = run("os.kill(pid, signal.SIGKILL); time.sleep(600)")
    assert code == program.EXIT_LOST
    assert said.startswith("the actor worker (WorkerDict, process PID on 127.0.0.1) died (")
    assert said.endswith("and verl did not end within 1 s")
    assert "error: the actor worker (WorkerDict" in errors


def test_a_dead_node_is_named(run):
    code, said, _ = run(
        "import psutil\n"
        "for p in psutil.Process().children(recursive=True):\n"
        "    if p.name() == 'raylet': p.kill()\n"
        "ray.get(actor.pid.remote())\ntime.sleep(600)"
    )
    assert code == 1
    assert said.startswith("the Ray node 127.0.0.1 died")


def test_the_cause_is_found_behind_nested_errors_of_ray():
    inner = ray.exceptions.RayTaskError("f", "trace", ValueError("two\n lines"))
    outer = ray.exceptions.RayTaskError("g", "trace", inner)
    assert program.one_line(program.root_cause(outer)) == "ValueError: two lines"
    assert program.one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert json.dumps(program.one_line(ValueError(""))) == '"ValueError"'
