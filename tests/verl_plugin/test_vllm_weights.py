"""The sockets of vLLM's weights: one name on both sides, and another in every Ray cluster."""

import os
from types import SimpleNamespace

import pytest

from hpo_verl.errors import EnvironmentCheckError

pytestmark = pytest.mark.vllm

JOB = "01000000"


@pytest.fixture
def weights():
    import verl.workers.rollout.vllm_rollout  # noqa: F401

    from hpo_verl.verl_plugin.rollout import vllm_weights

    return vllm_weights


@pytest.fixture
def both_sides(weights, monkeypatch):
    """What actor and vLLM worker call their socket, in a cluster of a given name."""
    from verl.workers.config import RolloutConfig
    from verl.workers.rollout import get_rollout_class
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("RAY_LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("VERL_REPLICA_RANK", "1")
    monkeypatch.setenv("VERL_RAY_JOB_ID", JOB)

    def both_sides(session, job=JOB):
        context = SimpleNamespace(get_session_name=lambda: session, get_job_id=lambda: job)
        monkeypatch.setattr(weights.ray, "get_runtime_context", lambda: context)
        config = RolloutConfig(name="vllm", tensor_model_parallel_size=2)
        actor = get_rollout_class("vllm")(config, None, None)

        class Server:
            def _post_init(self, cuda_visible_devices):
                os.environ["VERL_RAY_JOB_ID"] = job

        weights.name_sockets(SimpleNamespace(vLLMHttpServer=Server))
        Server()._post_init("0")
        worker = SimpleNamespace(model_runner=SimpleNamespace(), local_rank=1)
        return actor.zmq_handle, vLLMColocateWorkerExtension._get_zmq_handle(worker)

    return both_sides


def test_both_sides_agree_and_no_two_clusters_do(both_sides):
    one, same = both_sides("session_2026-11-25_12-48-28_123456_1234567")
    assert one == same
    assert one == (
        "ipc:///tmp/rl-colocate-zmq-session_2026-11-25_12-48-28_123456_1234567-01000000"
        "-replica-1-rank-1.sock"
    )
    # Linux takes 107 bytes, and replicas and ranks may have more digits.
    assert len(one.removeprefix("ipc://")) < 100
    other, same = both_sides("session_2026-11-25_12-48-28_123457_1234568")
    assert other == same != one


def test_jobs_of_one_cluster_differ(both_sides):
    assert both_sides("session_a", "01000000") != both_sides("session_a", "02000000")


def test_a_server_that_names_its_sockets_otherwise_is_refused(weights, both_sides):
    class Server:
        def _post_init(self, cuda_visible_devices):
            os.environ["VERL_RAY_JOB_ID"] = "a name of its own"

    both_sides("session_a")
    weights.name_sockets(SimpleNamespace(vLLMHttpServer=Server))
    with pytest.raises(EnvironmentCheckError, match=r"need verl 0\.9\.1"):
        Server()._post_init("0")


def test_an_adapter_that_names_its_sockets_otherwise_is_refused(weights, both_sides, monkeypatch):
    def init(self, *arguments):
        self.zmq_handle = "ipc:///tmp/a-name-of-its-own.sock"

    monkeypatch.setattr(weights.ServerAdapter, "__init__", init)
    with pytest.raises(EnvironmentCheckError, match=r"need verl 0\.9\.1"):
        both_sides("session_a")
