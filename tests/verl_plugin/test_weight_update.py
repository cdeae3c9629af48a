"""Transfers of weights to a server that fails, is silent, or answers."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import zmq
from ray.exceptions import RayActorError

from hpo_verl.config.recipes import compose_recipe, without_hydra
from hpo_verl.errors import ConfigError, WeightSyncError
from hpo_verl.verl_plugin.rollout.weight_update import (
    DEFAULT_SECONDS,
    KEY,
    WatchedSocket,
    server_failed,
    weight_update_timeout,
    within,
)
from hpo_verl.verl_plugin.run_validation import check_guards

LONG = 1e6


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.sock"


@pytest.fixture
def watched(context, file):
    """A watched socket like that of verl's sender, with a time limit and the server's reply."""

    def watched(seconds, reply=None):
        socket = context.socket(zmq.REQ)
        socket.bind(f"ipc://{file}")
        return WatchedSocket(socket, file, seconds, reply)

    return watched


@pytest.fixture
def server(context, file):
    """A connected server."""
    socket = context.socket(zmq.REP)
    socket.connect(f"ipc://{file}")
    return socket


def test_messages_and_answers_pass(watched, server, file):
    socket = watched(LONG, Future())
    for message in ({"bucket": 1}, {"bucket": 2}):
        socket.send_pyobj(message)
        assert server.recv_pyobj() == message
        server.send(b"taken")
        assert socket.recv() == b"taken"
    assert not file.exists()


def test_an_error_of_a_server_that_never_connected_is_raised(watched):
    reply = Future()
    reply.set_exception(RuntimeError("in a worker\nno such weight"))
    with pytest.raises(WeightSyncError, match=r"failed to take the weights: no such weight$"):
        watched(LONG, reply).send_pyobj("weights")


def test_an_error_instead_of_an_answer_is_raised(watched, server):
    reply = Future()
    socket = watched(LONG, reply)
    socket.send_pyobj("weights")
    server.recv()
    reply.set_exception(RuntimeError("no such weight"))
    with pytest.raises(WeightSyncError, match="no such weight") as raised:
        socket.recv()
    assert raised.value.__cause__ is reply.exception()


def test_an_answer_counts_that_came_before_the_reply(watched, server):
    reply = Future()
    socket = watched(LONG, reply)
    socket.send_pyobj("weights")
    server.recv()
    server.send(b"taken")
    reply.set_result(None)
    assert socket.recv() == b"taken"


@pytest.mark.parametrize("reply", [None, Future()], ids=["of another rank", "still to come"])
def test_a_silent_server_is_given_up(watched, server, reply):
    socket = watched(0.2, reply)
    socket.send_pyobj("weights")
    with pytest.raises(WeightSyncError, match=r"did not take a bucket of weights within 0\.2 s"):
        socket.recv()


def test_a_reply_that_does_not_come_ends_the_wait():
    async def wait():
        await within(asyncio.get_running_loop().create_future(), 0.05, "a bucket of weights")

    with pytest.raises(WeightSyncError, match=r"of weights within 0\.05 s"):
        asyncio.run(wait())


def test_a_reply_with_an_error_of_the_servers_is_told():
    async def fail():
        raise RayActorError(error_msg="in a worker\nno such weight")

    with pytest.raises(WeightSyncError, match="failed to take the weights: no such weight"):
        asyncio.run(within(fail(), LONG, "the last bucket of weights"))


def test_an_error_without_a_text_is_named():
    assert "failed to take the weights: ValueError()" in str(server_failed(ValueError()))


def test_the_limit_is_read_from_verls_place_for_further_settings():
    assert weight_update_timeout({"custom": {"weight_update_timeout": 5}}) == 5.0
    assert weight_update_timeout(SimpleNamespace(get={"custom": None}.get)) == DEFAULT_SECONDS
    assert weight_update_timeout({}) == DEFAULT_SECONDS


@pytest.mark.parametrize("value", [0, -1, "60", True, None, float("nan"), float("inf")])
def test_a_limit_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"rollout\.custom\.weight_update_timeout = "):
        weight_update_timeout({"custom": {"weight_update_timeout": value}})


def test_the_limit_is_a_key_of_the_recipes_and_checked_before_anything_starts():
    check_guards(without_hydra(compose_recipe("countdown-tiny", [f"{KEY}=60"])))
    with pytest.raises(ConfigError, match=r"weight_update_timeout = 0: must be a number"):
        check_guards(without_hydra(compose_recipe("countdown-tiny", [f"{KEY}=0"])))
