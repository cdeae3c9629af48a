"""Ctrl-C once asks, twice interrupts."""

import os
import signal

import pytest

from hpo_verl.runs.stop import (
    LISTENING,
    REQUESTED,
    SIGNALS,
    STOPPED,
    GracefulStop,
    stage_message,
    stop_message,
)


@pytest.fixture(autouse=True)
def heeded():
    """A shell lets what it starts in the background ignore Ctrl-C; these tests must not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def file(tmp_path):
    return stop_message(tmp_path)


@pytest.fixture
def said():
    return []


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks_and_the_second_interrupts(file, said, number):
    def stop_twice():
        with GracefulStop(file, said.append) as stop:
            file.write(LISTENING)
            stop.on_poll()
            assert said == []
            send(number)
            assert file.read() == REQUESTED
            stop.on_poll()
            stop.on_poll()
            assert len(said) == 1
            assert "Ctrl-C again" in said[0]
            send(number)

    with pytest.raises(KeyboardInterrupt):
        stop_twice()
    assert file.read() is None


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_interrupts_where_nobody_listens(file, said, number):
    # What an earlier run left says nothing of this one.
    file.create()
    file.write(LISTENING)

    def stop_once():
        with GracefulStop(file, said.append):
            send(number)

    with pytest.raises(KeyboardInterrupt):
        stop_once()


@pytest.mark.parametrize(("wrote", "stopped"), [(STOPPED, True), (REQUESTED, False), (None, False)])
def test_whether_the_trainer_ended_early(file, said, wrote, stopped):
    with GracefulStop(file, said.append) as stop:
        if wrote is not None:
            file.write(wrote)
    assert stop.stopped is stopped
    assert file.read() is None


def test_handlers_come_back_and_what_was_ignored_stays_so(file, said):
    before = [signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)]
    try:
        with GracefulStop(file, said.append) as stop:
            file.write(LISTENING)
            send(signal.SIGINT)
            assert not stop.asked
            assert signal.getsignal(signal.SIGTERM) == stop._handle
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == before[1]
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_a_trainer_without_a_launcher_writes_nothing(file, tmp_path):
    for message in (file, stage_message(tmp_path / "not there yet")):
        message.write(LISTENING)
        assert message.read() is None
    assert list(tmp_path.iterdir()) == []


def test_only_the_given_signals_are_heeded(file, said):
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStop(file, said.append, [signal.SIGINT]):
        assert signal.getsignal(signal.SIGTERM) == before
