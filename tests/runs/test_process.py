"""A run's processes, temporary files and shared memory end with it."""

import os
import subprocess
import sys
import uuid

import psutil
import pytest
from waiting import wait_until

from hpo_verl.runs import process as launch_process
from hpo_verl.runs.process import (
    MARKER,
    SHARED_MEMORY,
    ChildProcess,
    end_processes,
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


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(launch_process, "STOP_SECONDS", 3.0)


def family(seconds, code):
    text = FAMILY.format(seconds=seconds, code=code)
    return ChildProcess(["-c", text], lambda _: {})


@pytest.mark.parametrize("code", [0, 3])
def test_exit_code_and_no_process_left(tmp_path, code):
    log = tmp_path / "train.log"
    log.write_text("of an earlier start\n")
    with family(0.5, code) as process:
        process.go(log)
        assert process.wait(lambda: None) == code
        assert len(marked_processes(process.marker)) == 1
    assert marked_processes(process.marker) == []
    assert log.read_text().startswith("of an earlier start\n")
    assert "started" in log.read_text()


def test_an_exception_ends_all_processes_and_the_temporary_folder(tmp_path):
    log = tmp_path / "train.log"

    def interrupt():
        if "started" in log.read_text():
            raise KeyboardInterrupt

    process = family(600, 0)
    seen = []

    def run():
        with process:
            seen.append((process.temporary, process.temporary.stat().st_mode & 0o077))
            process.go(log)
            process.wait(interrupt)

    with pytest.raises(KeyboardInterrupt):
        run()
    ((temporary, others_may),) = seen
    assert others_may == 0
    assert marked_processes(process.marker) == []
    assert not temporary.exists()


WAITING = "import sys; line = sys.stdin.readline(); print('got', repr(line)); sys.exit(not line)"


def test_a_child_waits_for_its_line_and_then_logs(tmp_path):
    log = tmp_path / "train.log"
    with ChildProcess(["-c", WAITING], lambda _: {}) as process:
        assert not log.exists()
        process.go(log, "[1]")
        assert process.wait(lambda: None) == 0
    assert log.read_text() == "got '[1]\\n'\n"


def test_a_child_that_is_never_let_go_ends_and_leaves_nothing(tmp_path):
    descriptors = set(os.listdir("/proc/self/fd"))
    with ChildProcess(["-c", WAITING], lambda _: {}) as process:
        assert len(marked_processes(process.marker)) == 1
    assert marked_processes(process.marker) == []
    assert not process.temporary.exists()
    assert set(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(
    ("act", "code", "failure"),
    [
        ("report('ValueError: nan'); print('ray: bye'); sys.exit(1)", 1, "ValueError: nan"),
        ("print('first'); print('last'); print(' '); sys.exit(1)", 1, "last"),
        ("sys.exit(1)", 1, "no output"),
        (
            "print('working', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
            -9,
            "verl's main program was ended by SIGKILL; working",
        ),
    ],
)
def test_the_reason_of_a_failure(tmp_path, act, code, failure):
    text = (
        "import os, signal, sys\n"
        "report = lambda text: open(os.environ['HPO_VERL_FAILURE'], 'w').write(text)\n" + act
    )
    with ChildProcess(["-c", text], lambda _: {}) as process:
        process.go(tmp_path / "train.log")
        assert process.wait(lambda: None) == code
        assert process.failure() == failure


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


def test_killing_the_launcher_ends_the_child(tmp_path):
    marker = tmp_path / "marker"
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pathlib import Path\n"
            "from hpo_verl.runs.process import ChildProcess\n"
            f"text = {FAMILY.format(seconds=600, code=0)!r}\n"
            "with ChildProcess(['-c', text], lambda _: {}) as p:\n"
            f"    p.go(Path({str(tmp_path / 'log')!r}))\n"
            f"    Path({str(marker)!r}).write_text(str(p._child.pid))\n"
            "    p.wait(lambda: None)\n",
        ],
        # Killed as it is, it leaves its temporary folder.
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    wait_until(lambda: marker.exists() and marker.read_text(), 20)
    child = psutil.Process(int(marker.read_text()))
    wait_until(lambda: "started" in (tmp_path / "log").read_text(), 20)
    marked = child.environ()[MARKER]
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 20)
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
