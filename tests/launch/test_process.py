"""A run's processes, temporary files and shared memory end with it."""

import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from hpo_verl.launch import process as launch_process
from hpo_verl.launch import watch
from hpo_verl.launch.process import (
    MARKER,
    SHARED_MEMORY,
    ProcessLost,
    TrainingProcess,
    end_processes,
    last_error,
    marked_processes,
    remove_shared_memory,
)

# A child that starts a grandchild in a session of its own, as Ray does.
FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("started", flush=True)
time.sleep({seconds})
sys.exit({code})
"""


@pytest.fixture
def fake_verl(tmp_path, monkeypatch):
    """Stand in for verl's main program: a package of that name in front of the real one."""

    def install(seconds, code):
        package = tmp_path / "stand_in" / "verl" / "trainer"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").write_text("")
        (package / "__init__.py").write_text("")
        (package / "main_ppo.py").write_text(FAMILY.format(seconds=seconds, code=code))
        monkeypatch.setattr(launch_process, "STOP_SECONDS", 3.0)
        return lambda temporary: {"PYTHONPATH": str(tmp_path / "stand_in")}

    return install


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("code", [0, 3])
def test_exit_code_and_no_process_left(tmp_path, fake_verl, code):
    log = tmp_path / "train.log"
    with TrainingProcess([], log, fake_verl(0.5, code)) as process:
        assert process.wait(lambda: None) == code
        assert len(marked_processes(process.marker)) == 1
    assert marked_processes(process.marker) == []
    assert "started" in log.read_text()


def test_an_exception_ends_all_processes_and_the_temporary_folder(tmp_path, fake_verl):
    log = tmp_path / "train.log"

    def interrupt():
        if "started" in log.read_text():
            raise KeyboardInterrupt

    process = TrainingProcess([], log, fake_verl(600, 0))
    seen = []

    def run():
        with process:
            seen.append((process._temporary, process._temporary.stat().st_mode & 0o077))
            process.wait(interrupt)

    with pytest.raises(KeyboardInterrupt):
        run()
    ((temporary, others_may),) = seen
    assert others_may == 0
    assert marked_processes(process.marker) == []
    assert not temporary.exists()


# A child whose grandchild is named as Ray names an actor's process.
ACTOR = """
import os, signal, subprocess, sys, time
actor = subprocess.Popen(["ray::WorkerDict.update", "600"], executable="/bin/sleep")
time.sleep(1)
{act}
"""


@pytest.fixture
def fake_verl_with_an_actor(tmp_path, fake_verl, monkeypatch):
    def install(act):
        environment = fake_verl(0, 0)
        main = tmp_path / "stand_in" / "verl" / "trainer" / "main_ppo.py"
        monkeypatch.setattr(watch, "LOOK_SECONDS", 0.2)
        main.write_text(ACTOR.format(act=act))
        return environment

    return install


def test_a_stopped_process_ends_the_run(tmp_path, fake_verl_with_an_actor, monkeypatch):
    monkeypatch.setattr(watch, "STOPPED_LOOKS", 10)
    environment = fake_verl_with_an_actor("actor.send_signal(signal.SIGSTOP); time.sleep(600)")
    process = TrainingProcess([], tmp_path / "train.log", environment)
    # Not asked to end first, for which it would have all of this.
    monkeypatch.setattr(launch_process, "STOP_SECONDS", 60.0)
    started = time.monotonic()
    named = r"the actor worker \(WorkerDict, process \d+\) has been stopped \(SIGSTOP\) for 2 s"
    with process, pytest.raises(ProcessLost, match=named):
        process.wait(lambda: None)
    assert marked_processes(process.marker) == []
    assert time.monotonic() - started < 30


def test_a_dead_process_ends_a_run_that_goes_on(tmp_path, fake_verl_with_an_actor, monkeypatch):
    monkeypatch.setattr(watch, "DEATH_SECONDS", 1.0)
    environment = fake_verl_with_an_actor("actor.kill(); time.sleep(600)")
    process = TrainingProcess([], tmp_path / "train.log", environment)
    with (
        process,
        pytest.raises(ProcessLost, match=r"WorkerDict, process \d+\) was ended by SIGKILL"),
    ):
        process.wait(lambda: None)
    assert marked_processes(process.marker) == []


DEATH = r"the actor worker \(WorkerDict, process \d+\) was ended by SIGKILL; "


@pytest.mark.parametrize(
    ("act", "code", "failure"),
    [
        # The death is the reason, and what verl says of it comes after.
        ("actor.kill(); time.sleep(1); raise RuntimeError('no groups')", 1, DEATH + ".*no groups"),
        # The failure is the reason, and the death is that of a run which ends.
        (
            "import atexit; atexit.register(lambda: (actor.kill(), time.sleep(1)))\n"
            "raise RuntimeError('nan')",
            1,
            "RuntimeError: nan",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            -9,
            "verl's main program was ended by SIGKILL; no output",
        ),
    ],
)
def test_the_reason_of_a_failure(tmp_path, fake_verl_with_an_actor, act, code, failure):
    with TrainingProcess([], tmp_path / "train.log", fake_verl_with_an_actor(act)) as process:
        assert process.wait(lambda: None) == code
    assert re.fullmatch(failure, process.failure()), process.failure()


def test_a_process_that_ignores_the_request_is_killed(monkeypatch):
    monkeypatch.setattr(launch_process, "STOP_SECONDS", 1.0)
    marker = uuid.uuid4().hex
    stubborn = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "print(1, flush=True); time.sleep(600)",
        ],
        env={MARKER: marker},
        stdout=subprocess.PIPE,
    )
    stubborn.stdout.readline()
    end_processes(lambda: marked_processes(marker))
    assert stubborn.wait(5) == -9


def test_a_process_that_one_look_does_not_find_is_ended():
    sleeper = subprocess.Popen(["sleep", "600"])
    looks = []

    def find():
        looks.append(1)
        alive = sleeper.poll() is None and len(looks) > 1
        return [psutil.Process(sleeper.pid)] if alive else []

    end_processes(find)
    assert sleeper.wait(5) == -15


def test_killing_the_launcher_ends_the_child(tmp_path, fake_verl):
    environment = fake_verl(600, 0)(None)
    marker = tmp_path / "marker"
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pathlib import Path\n"
            "from hpo_verl.launch.process import TrainingProcess\n"
            f"log, env = Path({str(tmp_path / 'log')!r}), {environment!r}\n"
            "with TrainingProcess([], log, lambda _: env) as p:\n"
            f"    Path({str(marker)!r}).write_text(str(p._child.pid))\n"
            "    p.wait(lambda: None)\n",
        ],
        # Killed as it is, it leaves its temporary folder.
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    wait_for(lambda: marker.exists() and marker.read_text())
    child = psutil.Process(int(marker.read_text()))
    wait_for(lambda: "started" in (tmp_path / "log").read_text())
    marked = child.environ()[MARKER]
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    # The grandchild of this stand-in does not follow; Ray's processes do.
    end_processes(lambda: marked_processes(marked))


def test_shared_memory_that_nobody_maps_is_removed():
    if not SHARED_MEMORY.is_dir():
        return
    abandoned = SHARED_MEMORY / f"psm_{uuid.uuid4().hex}"
    abandoned.write_bytes(b"x")
    remove_shared_memory({abandoned.name})
    assert not abandoned.exists()


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="this system has no /dev/shm")
def test_shared_memory_of_a_run_is_told_by_its_name_and_owner(monkeypatch):
    semaphore = SHARED_MEMORY / f"sem.mp-{uuid.uuid4().hex[:8]}"
    other = SHARED_MEMORY / f"other_{uuid.uuid4().hex}"
    for file in (semaphore, other):
        file.write_bytes(b"x")
    try:
        found = launch_process._shared_memory_files()
        assert semaphore.name in found
        assert other.name not in found
        monkeypatch.setattr(os, "getuid", lambda: semaphore.stat().st_uid + 1)
        assert semaphore.name not in launch_process._shared_memory_files()
    finally:
        semaphore.unlink()
        other.unlink()


def test_shared_memory_in_use_stays():
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=16)
    try:
        name = memory.name.lstrip("/")
        remove_shared_memory({name})
        assert (SHARED_MEMORY / name).exists() or not SHARED_MEMORY.is_dir()
    finally:
        memory.close()
        memory.unlink()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nValueError: bad\nmore\n", "ValueError: bad"),
        (
            "(pid=1) x\nKeyError: one\nhpo_verl.errors.DataError: two",
            "hpo_verl.errors.DataError: two",
        ),
        ("only this\n", "only this"),
        ("", "no output"),
    ],
)
def test_last_error(tmp_path, text, expected):
    log = Path(tmp_path / "log")
    log.write_text(text)
    assert last_error(log) == expected
