"""The sockets of vLLM's weights: both ends agree, and no two Ray clusters do."""

import asyncio
import os
import threading
from concurrent.futures import Future

import pytest
import torch

from hpo_verl.errors import WeightSyncError

pytestmark = pytest.mark.vllm

HANDLE = "ipc:///tmp/rl-colocate-zmq-01000000-replica-1-rank-1.sock"


@pytest.fixture
def ends(monkeypatch):
    """verl's two ends of a transfer, as verl finds them."""
    from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer, vllm_rollout

    monkeypatch.setenv("RAY_RAYLET_PID", "4194304")
    return vllm_rollout.BucketedWeightSender, bucketed_weight_transfer.BucketedWeightReceiver


def test_both_ends_agree_and_no_two_clusters_do(ends, monkeypatch):
    sender, receiver = ends
    one = sender(HANDLE).zmq_handle
    assert one == receiver(HANDLE, torch.device("cpu")).zmq_handle
    assert one.startswith(HANDLE.removesuffix(".sock"))
    # Linux takes 107 bytes, and replicas and ranks may have more digits.
    assert len(one.removeprefix("ipc://")) < 100
    monkeypatch.setenv("RAY_RAYLET_PID", "4194303")
    assert sender(HANDLE).zmq_handle == receiver(HANDLE, torch.device("cpu")).zmq_handle != one


def test_jobs_of_one_cluster_differ(ends):
    sender, _ = ends
    other = HANDLE.replace("01000000", "02000000")
    assert sender(HANDLE).zmq_handle != sender(other).zmq_handle


@pytest.fixture
def handle(tmp_path):
    return f"ipc://{tmp_path}/weights.sock"


def test_weights_arrive_and_the_reply_is_awaited(ends, handle):
    sender, receiver = ends
    sender.seconds, sender.reply = 60.0, Future()
    arrived = {}

    def receive():
        def take(weights, is_last):
            arrived.update({name: tensor.clone() for name, tensor in weights})

        receiver(handle, torch.device("cpu"), use_shm=True).receive_weights(take)
        sender.reply.set_result(None)

    server = threading.Thread(target=receive)
    server.start()
    weights = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    sending = sender(handle, bucket_size_mb=1, use_shm=True)
    asyncio.run(sending.async_send_weights(iter(weights.items())))
    assert sender.reply.done()
    server.join()
    assert arrived.keys() == weights.keys()
    assert all(torch.equal(arrived[name], weights[name]) for name in weights)
    assert os.listdir(os.path.dirname(handle.removeprefix("ipc://"))) == []


def test_an_error_of_the_server_ends_the_transfer(ends, handle):
    sender, _ = ends
    sender.seconds, sender.reply = 60.0, Future()
    sender.reply.set_exception(RuntimeError("no such weight"))
    with pytest.raises(WeightSyncError, match="no such weight"):
        asyncio.run(sender(handle, 1, use_shm=True).async_send_weights(iter([])))
