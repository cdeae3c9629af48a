"""Which process of a run is lost, seen on small trees of stand-ins named as Ray names its own."""

import os
import platform
import signal
import subprocess
import time
import uuid

import psutil
import pytest

from hpo_verl.launch import watch as watching
from hpo_verl.launch.watch import MARKER, ProcessWatch, title


@pytest.fixture
def marker():
    return uuid.uuid4().hex


@pytest.fixture
def stand_in(marker):
    """Start a process that is called as given and sleeps, or runs a script of bash."""
    started = []

    def start(name, script="exec -a {name} sleep 60"):
        process = subprocess.Popen(
            [name, "-c", script.format(name=f"'{name}'")],
            executable="/bin/bash",
            env={**os.environ, MARKER: marker},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def watch(marker, monkeypatch):
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.05)
    deaths = []
    with ProcessWatch(marker, on_death=lambda: deaths.append(1)) as watch:
        yield watch
    # Told once at most, whatever died later.
    assert len(deaths) == (watch.death is not None)


def watch_until(watch, condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        watch.wait(0.05)


def seen(watch, *processes):
    """Wait until the processes are known by the names that they have after their exec."""

    def named():
        known = [watch._watched.get(process.pid) for process in processes]
        return all(one and one.title not in ("", "bash") for one in known)

    watch_until(watch, named)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["ray::WorkerDict.update_actor      "], "ray::WorkerDict.update_actor"),
        (
            ["/ray/raylet", "--python_worker_command=python -m x /ray/worker.py", "-m", "x"],
            "raylet",
        ),
        (["/ray/gcs_server", "--log_dir=/x"], "gcs_server"),
        (["/bin/python3.11", "-c", "pass"], "python3.11"),
        (["/bin/python3", "-m", "verl.trainer.main_ppo", "a=b"], "verl.trainer.main_ppo"),
        (["/bin/python3", "-u", "/ray/log_monitor.py", "--x"], "log_monitor.py"),
        (["VLLM::EngineCore"], "VLLM::EngineCore"),
        (["sort", "-m"], "sort"),
        ([], ""),
    ],
)
def test_title(command, expected):
    assert title(command) == expected


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ray::WorkerDict.update_actor", "the actor worker (WorkerDict, process {pid})"),
        ("ray::HFServer.generate_batch", "the rollout server (HFServer, process {pid})"),
        ("ray::RewardLoopWorker", "the reward worker (RewardLoopWorker, process {pid})"),
        ("raylet", "the Ray node (raylet, process {pid})"),
        ("ray::TheirOwnActor.run", "TheirOwnActor, process {pid}"),
        ("VLLM::EngineCore", "EngineCore, process {pid}"),
    ],
)
def test_the_first_that_is_killed_is_named(watch, stand_in, monkeypatch, name, shown):
    monkeypatch.setattr(watching, "DEATH_SECONDS", 0.5)
    first, second = stand_in(name), stand_in("ray::SimpleStorageUnit")
    seen(watch, first, second)
    assert watch.problem() is None
    first.kill()
    watch_until(watch, lambda: watch.death)
    second.kill()
    expected = f"{shown.format(pid=first.pid)} was ended by SIGKILL"
    assert watch.death.shown == expected
    # verl has time to end by itself, and no more.
    assert watch.problem() is None
    watch_until(watch, watch.problem)
    assert watch.problem() == f"{expected}, and the run did not end within 0 s"


@pytest.mark.parametrize("torn", [{}, {MARKER: "to"}], ids=["empty", "torn"])
def test_one_that_becomes_another_program_while_it_is_looked_at(watch, stand_in, monkeypatch, torn):
    """Between its fork and its exec's end /proc shows an environment that is none."""
    process, real, looks = stand_in("ray::WorkerDict"), psutil.Process.environ, []

    def environ(self):
        if self.pid == process.pid:
            looks.append(self.pid)
        return torn if len(looks) == 1 and self.pid == process.pid else real(self)

    monkeypatch.setattr(psutil.Process, "environ", environ)
    seen(watch, process)
    assert len(looks) == 2


def test_the_processes_of_others_are_asked_twice_and_no_more(watch, monkeypatch):
    asked = []
    monkeypatch.setattr(psutil.Process, "environ", lambda self: asked.append(self.pid) or {})
    for _ in range(4):
        watch._look()
    assert max(map(asked.count, asked)) == 2


def test_a_death_is_noticed_at_once(watch, stand_in):
    process = stand_in("ray::WorkerDict")
    seen(watch, process)
    process.kill()
    started = time.monotonic()
    watch.wait(20)
    assert time.monotonic() - started < 5
    assert watch.death


def test_an_exit_code_is_named(watch, stand_in):
    process = stand_in("ray::HFServer", "sleep 0.5; exit 3")
    seen(watch, process)
    watch_until(watch, lambda: watch.death)
    assert watch.death.shown == (
        f"the rollout server (HFServer, process {process.pid}) ended with exit code 3"
    )


def test_of_those_that_end_together_the_ancestor_is_named(watch, stand_in):
    node = stand_in("raylet", "(exec -a ray::WorkerDict sleep 60) & exec -a raylet sleep 60")
    seen(watch, node)
    watch_until(watch, lambda: [w for w in watch._watched.values() if w.parent == node.pid])
    workers = [w for w in watch._watched.values() if w.parent == node.pid]
    for worker in workers:
        worker.process.kill()
    node.kill()
    node.wait()
    watch_until(watch, lambda: watch.death)
    assert watch.death.shown.startswith("the Ray node (raylet")


def test_a_regular_exit_is_no_death(watch, stand_in):
    process = stand_in("ray::Temporary", "sleep 0.5; exit 0")
    seen(watch, process)
    watch_until(watch, lambda: process.pid not in watch._watched)
    assert watch.death is None


@pytest.mark.parametrize("name", ["ray::IDLE", "ray::IDLE_SpillWorker", "ray::a_task", "nvcc"])
def test_what_a_run_does_without_may_die(watch, stand_in, name):
    process = stand_in(name)
    seen(watch, process)
    process.kill()
    watch_until(watch, lambda: process.pid not in watch._watched)
    assert watch.death is None
    assert watch.problem() is None


def test_a_stopped_process_is_named_unless_it_goes_on(watch, stand_in, monkeypatch):
    monkeypatch.setattr(watching, "STOPPED_LOOKS", 5)
    process = stand_in("ray::HFServer")
    seen(watch, process)
    known = watch._watched[process.pid]
    process.send_signal(signal.SIGSTOP)
    watch_until(watch, lambda: known.stopped_looks >= 2)
    assert watch.problem() is None
    process.send_signal(signal.SIGCONT)
    watch_until(watch, lambda: known.stopped_looks == 0)
    process.send_signal(signal.SIGSTOP)
    watch_until(watch, watch.problem)
    assert known.stopped_looks == 5
    assert watch.problem() == (
        f"the rollout server (HFServer, process {process.pid}) has been stopped (SIGSTOP) for 0 s"
    )


def test_a_stopped_reward_is_left_to_its_guard(watch, stand_in, monkeypatch):
    monkeypatch.setattr(watching, "STOPPED_LOOKS", 2)
    process = stand_in(watching.REPLACED)
    seen(watch, process)
    process.send_signal(signal.SIGSTOP)
    watch_until(watch, lambda: watch._watched[process.pid].stopped_looks > 3)
    assert watch.problem() is None


def test_processes_of_another_run_are_none_of_its_business(watch, stand_in, monkeypatch):
    monkeypatch.setattr(watch, "marker", "another")
    process = stand_in("ray::WorkerDict")
    for _ in range(5):
        watch.wait(0.1)
    process.kill()
    watch.wait(0.1)
    assert watch._watched == {}
    assert watch.death is None


def tells_how_others_ended():
    return tuple(int(part) for part in platform.release().split(".")[:2]) >= (6, 15)


@pytest.mark.parametrize("lacking", [(), ("ioctl",), ("ioctl", "pidfd_open")])
def test_an_end_that_its_parent_has_seen(watch, stand_in, monkeypatch, lacking):
    """As Ray's node does with its workers; older systems then do not tell how they ended."""

    def refuse(*_):
        raise OSError("not known")

    if "ioctl" in lacking or not tells_how_others_ended():
        monkeypatch.setattr(watching.fcntl, "ioctl", refuse)
        how = "died"
    else:
        how = "was ended by SIGKILL"
    if "pidfd_open" in lacking:
        monkeypatch.setattr(watching.os, "pidfd_open", refuse)
    process = stand_in("ray::WorkerDict")
    seen(watch, process)
    process.kill()
    process.wait()
    watch_until(watch, lambda: watch.death)
    assert watch.death.shown == f"the actor worker (WorkerDict, process {process.pid}) {how}"
