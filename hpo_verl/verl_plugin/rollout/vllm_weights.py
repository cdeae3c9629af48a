"""verl's transfer of weights to vLLM, with sockets of its own for every run and waits that end.

verl sends the weights through `/tmp/rl-colocate-zmq-<Ray job>-replica-<n>-rank-<n>.sock`, and
removes that file first. Every Ray cluster that a run starts for itself calls its first job
01000000, so two such runs on one machine could load each other's weights. Here Ray's session
name, which is unique for each cluster, stands before the job's on both sides.

verl's sender waits inside ZeroMQ for the server, and looks at the server's reply only
afterwards, so it never sees an error of the server. Here it watches the reply while it waits.

verl imports both sides; `verl_plugin` calls `watch` and `name_sockets` when it has.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Generator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.verl_plugin.rollout.weight_update import (
    Transfer,
    WatchedSocket,
    server_failed,
    weight_update_timeout,
    within,
)

# verl names the sockets of vLLM's workers by it.
JOB_VARIABLE = "VERL_RAY_JOB_ID"

_transfer: ContextVar[Transfer | None] = ContextVar("transfer", default=None)


def run_name() -> str:
    """A name of this run that no other run on this machine has."""
    context = ray.get_runtime_context()
    return f"{context.get_session_name()}-{context.get_job_id()}"


class WatchedSender(BucketedWeightSender):
    """verl's sender, on a watched socket."""

    def _init_socket(self) -> None:
        super()._init_socket()
        socket: Any = self.socket
        if transfer := _transfer.get():
            file = Path(self.zmq_handle.removeprefix("ipc://"))
            self.socket = WatchedSocket(socket, file, transfer)


class WatchedReply:
    """The server's reply to a whole transfer, bounded from when it is awaited.

    Args:
        reply: of the server.
        seconds: the limit.
    """

    def __init__(self, reply: Awaitable[Any], seconds: float) -> None:
        self._reply = reply
        self._seconds = seconds

    def __await__(self) -> Generator[Any, None, Any]:
        return self._result().__await__()

    async def _result(self) -> Any:
        try:
            return await within(self._reply, self._seconds, "the last bucket of weights")
        except RayError as error:
            raise server_failed(error) from error


class WatchedServerAdapter(ServerAdapter):
    """verl's adapter of a vLLM server, with sockets of this run alone.

    Takes verl's arguments.

    Raises:
        EnvironmentCheckError: a verl that names its sockets in another way.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        job = ray.get_runtime_context().get_job_id()
        if job not in self.zmq_handle:
            raise unknown_sockets()
        self.zmq_handle = self.zmq_handle.replace(job, run_name())

    async def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """Send all weights to the server.

        Raises:
            WeightSyncError: the server failed, or took longer over a bucket than
                `weight_update_timeout` permits.
        """
        token = _transfer.set(Transfer(weight_update_timeout(self.config)))
        try:
            await super().update_weights(*args, **kwargs)
        finally:
            _transfer.reset(token)

    async def _execute_method(
        self,
        method: str,
        non_block: bool = False,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        reply = await super()._execute_method(method, non_block, timeout, args, kwargs)
        transfer = _transfer.get()
        if not non_block or reply is None or transfer is None:
            return reply
        transfer.reply = reply.future()
        return WatchedReply(reply, transfer.seconds)


def watch(adapters: Any) -> None:
    """Put our adapter and sender into verl's module, where verl looks for its own.

    Args:
        adapters: verl's module of the adapter, before anything else has imported from it.
    """
    adapters.ServerAdapter = WatchedServerAdapter
    adapters.BucketedWeightSender = WatchedSender


def name_sockets(servers: Any) -> None:
    """Make vLLM's workers, which inherit their server's environment, use this run's sockets.

    Args:
        servers: verl's module of the vLLM server.
    """
    post_init = servers.vLLMHttpServer._post_init

    @functools.wraps(post_init)
    def named(self: Any, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        job = ray.get_runtime_context().get_job_id()
        if os.environ.get(JOB_VARIABLE) != job or not _adapter_is_watched():
            raise unknown_sockets()
        os.environ[JOB_VARIABLE] = run_name()

    servers.vLLMHttpServer._post_init = named


def _adapter_is_watched() -> bool:
    from verl.workers.rollout import get_rollout_class

    return issubclass(get_rollout_class("vllm"), WatchedServerAdapter)


def unknown_sockets() -> EnvironmentCheckError:
    """The error of a verl whose two sides cannot be given the same names."""
    return EnvironmentCheckError(
        "actor_rollout_ref.rollout.name=vllm: this verl names the sockets of its weights in a way "
        "that is not known here, and runs on one machine might share them; need verl 0.9.1"
    )
