"""verl's transfer of weights to vLLM, on sockets of its own and with waits that end.

verl sends through `/tmp/rl-colocate-zmq-<Ray job>-replica-<n>-rank-<n>.sock`, and removes that
file first. Every Ray cluster calls its first job 01000000, so two runs on one machine, each
with a cluster of its own, could load each other's weights. Here both ends add the process id
of their raylet: Ray gives it to every worker, and vLLM's processes inherit it from theirs.

verl's sender waits inside ZeroMQ for the server and looks at the server's reply only
afterwards, so it never sees an error of the server. Here it watches the reply while it waits.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import (
    BucketedWeightReceiver,
    BucketedWeightSender,
)
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from hpo_verl.verl_plugin.rollout.weight_update import (
    WatchedSocket,
    weight_update_timeout,
    within,
)


def own_socket(zmq_handle: str) -> str:
    """Address of a socket as verl has it, with what tells this Ray node from others added."""
    # Containers may share /tmp, but count processes each for itself.
    namespace = os.stat("/proc/self/ns/pid").st_ino
    raylet = os.environ["RAY_RAYLET_PID"]
    return f"{zmq_handle.removesuffix('.sock')}-{namespace}-{raylet}.sock"


class OwnReceiver(BucketedWeightReceiver):
    """verl's receiver, on a socket of its own."""

    def __init__(self, zmq_handle: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(own_socket(zmq_handle), *args, **kwargs)


class WatchedSender(BucketedWeightSender):
    """verl's sender, on a socket of its own; its waits end with the server's error or in time.

    verl makes the sender; the adapter therefore leaves its time limit and the server's reply
    with the class. A process sends one set of weights at a time.
    """

    seconds: ClassVar[float]
    reply: ClassVar[Future[Any] | None]

    def __init__(self, zmq_handle: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(own_socket(zmq_handle), *args, **kwargs)

    def _init_socket(self) -> None:
        super()._init_socket()
        socket: Any = self.socket
        file = Path(self.zmq_handle.removeprefix("ipc://"))
        self.socket = WatchedSocket(socket, file, self.seconds, self.reply)

    async def async_send_weights(self, weights: Any) -> None:
        """Send all weights, and wait until the server has loaded them."""
        await super().async_send_weights(weights)
        if self.reply is not None:
            loaded = asyncio.wrap_future(self.reply)
            await within(loaded, self.seconds, "the last bucket of weights")


class WatchedServerAdapter(ServerAdapter):
    """verl's adapter of a vLLM server, which tells the sender of the server's reply."""

    async def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """Send all weights to the server, or raise a WeightSyncError if it fails or is late."""
        WatchedSender.seconds = weight_update_timeout(self.config)
        WatchedSender.reply = None
        await super().update_weights(*args, **kwargs)

    async def _execute_method(
        self, method: str, non_block: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        reply = await super()._execute_method(method, non_block, *args, **kwargs)
        if non_block and reply is not None:
            WatchedSender.reply = reply.future()
        return reply


def watch(adapters: Any) -> None:
    """Put our classes where verl looks for its own, before anything has imported them."""
    adapters.ServerAdapter = WatchedServerAdapter
    adapters.BucketedWeightSender = WatchedSender
    bucketed_weight_transfer.BucketedWeightReceiver = OwnReceiver
