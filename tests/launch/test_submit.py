"""What is sent to a cluster, what answers there, and how a job's end is told."""

import asyncio
import contextlib
import io
import shlex
import threading
import zipfile
from types import SimpleNamespace

import pytest
import ray
from aiohttp import web
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray.job_submission import JobStatus
from ray.util import state as ray_state

from hpo_verl.errors import CheckFailedError, ConfigError, EnvironmentCheckError, TrainingFailed
from hpo_verl.launch import submit


class Cluster:
    """A client whose job says and becomes what a test wants.

    Args:
        log: the whole output.
        status: how the job ends.
        looks: before its end, the output so far at each look, or an error.
    """

    def __init__(self, log="", status="SUCCEEDED", exit_code=1, message=None, looks=()):
        self.looks = [*looks, log]
        self.running = SimpleNamespace(status=JobStatus.RUNNING)
        self.info = SimpleNamespace(
            status=JobStatus(status), driver_exit_code=exit_code, message=message
        )
        self.submitted, self.stopped = None, []

    def submit_job(self, **job):
        self.submitted = job
        return "job-1"

    def get_job_info(self, job):
        return self.running if self.looks[1:] else self.info

    def get_job_logs(self, job):
        seen = self.looks.pop(0)
        if isinstance(seen, BaseException):
            raise seen
        return seen

    def stop_job(self, job):
        self.stopped.append(job)


@pytest.fixture
def nodes():
    """The living nodes as Ray lists them, which a test may change."""
    return [SimpleNamespace(resources_total={"CPU": 9.0, "GPU": 1.0})]


@pytest.fixture
def run(monkeypatch, nodes):
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(ray_state, "list_nodes", lambda **options: nodes)

    def run(cluster, overrides=("hydra.run.dir=/run",), wait=True, resume=False):
        monkeypatch.setattr(submit, "connect", lambda address: cluster)
        said, written = [], []
        arguments = ("countdown-tiny", list(overrides), "head:8265", wait)
        try:
            submit.submit(*arguments, said.append, written.append, resume)
        finally:
            cluster.said, cluster.written = said, "".join(written)

    return run


def test_job_is_the_command_with_quoted_overrides(run):
    cluster = Cluster()
    hostile = 'trainer.project_name="it\'s; touch $HOME/x"'
    run(cluster, ["hydra.run.dir=/run", hostile, "seed=3"], wait=False)
    words = shlex.split(cluster.submitted["entrypoint"])
    assert words == [
        *("python", "-m", "hpo_verl", "train", "countdown-tiny"),
        *(hostile, "seed=3", "hydra.run.dir=/run"),
    ]
    assert cluster.submitted["runtime_env"] == submit.cluster.job_runtime_env()
    assert "job: job-1" in cluster.said
    assert any("ray job stop --address http://head:8265 job-1" in line for line in cluster.said)


def test_a_job_goes_on_with_a_named_run_only(run):
    cluster = Cluster()
    run(cluster, wait=False, resume=True)
    assert cluster.submitted["entrypoint"].endswith(" hydra.run.dir=/run --resume")
    with pytest.raises(ConfigError, match="--resume: name the run's folder"):
        run(cluster, ["seed=3"], resume=True)


def test_output_is_written_once_as_it_comes(run):
    looks = ["a\nb", ConnectionError("gone"), "a\nb", "a\nb\nc\n"]
    cluster = Cluster("a\nb\nc\nd\n", looks=looks)
    run(cluster)
    assert cluster.written == "a\nb\nc\nd\n"


LOG = "a\nerror: training ended with exit code 1: ValueError: no\nfull output: /run/train.log\n"


@pytest.mark.parametrize(
    ("status", "log", "code", "message", "kind", "told"),
    [
        ("FAILED", LOG, 1, None, TrainingFailed, "ValueError: no\nfull output: /run/train.log"),
        ("FAILED", "error: seed=-1: wrong\n", 2, None, ConfigError, "seed=-1: wrong"),
        ("FAILED", "", None, "No such\nfile", TrainingFailed, "job-1 failed: file"),
        ("STOPPED", "a\n", None, None, TrainingFailed, "job-1 stopped: a"),
    ],
)
def test_a_failure_ends_with_the_jobs_own_error(run, status, log, code, message, kind, told):
    with pytest.raises(kind) as caught:
        run(Cluster(log, status, code, message))
    assert str(caught.value).endswith(told)


def test_ctrl_c_stops_the_job(run):
    cluster = Cluster("a\n", status="STOPPED", looks=["a\n", KeyboardInterrupt(), "a\n"])
    with pytest.raises(KeyboardInterrupt):
        run(cluster)
    assert cluster.stopped == ["job-1"]
    assert cluster.written == "a\n"
    # It has waited for the end.
    assert cluster.looks == []


def test_ctrl_c_while_the_cluster_is_gone(run):
    cluster = Cluster(looks=[KeyboardInterrupt()])

    def stop_job(job):
        raise ConnectionError("refused\nby the head")

    cluster.stop_job = stop_job
    with pytest.raises(TrainingFailed) as told:
        run(cluster)
    assert str(told.value) == (
        "job job-1: the cluster does not answer (refused by the head); the job may still run"
    )


def test_a_cluster_that_is_gone(run, monkeypatch):
    monkeypatch.setattr(submit, "SILENCE_SECONDS", -1.0)
    with pytest.raises(TrainingFailed, match="has not answered"):
        run(Cluster(looks=[ConnectionError("refused")]))


def test_wrong_input_never_reaches_the_cluster(run):
    cluster = Cluster()
    for overrides in (["algo=grpoo"], ["seed=-1"], ["data.train_files=a.parquet"]):
        with pytest.raises(CheckFailedError):
            run(cluster, overrides)
    assert cluster.submitted is None


@pytest.mark.parametrize(
    ("overrides", "resources", "message"),
    [
        ([], [], "n_gpus_per_node=1: this cluster has none"),
        ([], [(4, 0)], "this cluster has 0"),
        (["trainer.n_gpus_per_node=2"], [(9, 1), (9, 1)], "this cluster has 1 . 1"),
        (["trainer.nnodes=2"], [(9, 0), (9, 1)], "this cluster has 0 . 1"),
        ([], [(2, 0), (3, 1)], "= 6; there are 2 . 3, with which Ray waits"),
        ([], [(64, 0), (2, 1)], "there are 64 . 2, .*; 3 of them on each of 1 machines"),
    ],
)
def test_a_cluster_with_too_little_never_gets_the_job(run, nodes, overrides, resources, message):
    nodes[:] = [
        SimpleNamespace(resources_total={"CPU": float(cpus), "GPU": float(gpus)})
        for cpus, gpus in resources
    ]
    cluster = Cluster()
    with pytest.raises(CheckFailedError, match=message):
        run(cluster, ["hydra.run.dir=/run", *overrides])
    assert cluster.submitted is None


def test_three_cpus_of_the_rank_and_three_more_are_enough(run, nodes):
    nodes[:] = [
        SimpleNamespace(resources_total=resources)
        for resources in ({"CPU": 3.0}, {"CPU": 3.0, "GPU": 1.0})
    ]
    cluster = Cluster()
    run(cluster, wait=False)
    assert cluster.submitted is not None


def test_a_refused_job_is_one_error(run):
    cluster = Cluster()
    cluster.submit_job = lambda **job: (_ for _ in ()).throw(RuntimeError("status 500\nmore"))
    with pytest.raises(EnvironmentCheckError, match=r"takes no job \(status 500"):
        run(cluster)


class Dashboard:
    """As much of a dashboard as Ray's own client needs for a job, on loopback."""

    def __init__(self):
        self.log = "first\nsecond\n"
        self.uploaded, self.submitted = {}, None
        self.app = web.Application(client_max_size=DASHBOARD_CLIENT_MAX_SIZE)
        self.app.router.add_get("/api/version", self.version)
        self.app.router.add_get("/api/packages/gcs/{name}", self.package)
        self.app.router.add_put("/api/packages/gcs/{name}", self.upload)
        self.app.router.add_post("/api/jobs/", self.submit)
        self.app.router.add_get("/api/jobs/job-1", self.info)
        self.app.router.add_get("/api/jobs/job-1/logs", self.logs)

    async def version(self, request):
        return web.json_response({"version": "4", "ray_version": ray.__version__})

    async def package(self, request):
        return web.Response(status=200 if request.match_info["name"] in self.uploaded else 404)

    async def upload(self, request):
        self.uploaded[request.match_info["name"]] = await request.read()
        return web.Response()

    async def submit(self, request):
        self.submitted = await request.json()
        return web.json_response({"job_id": "job-1", "submission_id": "job-1"})

    async def info(self, request):
        return web.json_response({"type": "SUBMISSION", "entrypoint": "", "status": "SUCCEEDED"})

    async def logs(self, request):
        return web.json_response({"logs": self.log})


@contextlib.contextmanager
def listening(app):
    """The address at which a web application answers in a thread."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)

    async def start():
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner.addresses[0][1]

    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def test_rays_own_client_uploads_submits_and_follows(monkeypatch, nodes):
    monkeypatch.setattr(ray_state, "list_nodes", lambda **options: nodes)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)
    # Set by `connect`.
    monkeypatch.setenv(submit.ADDRESS_VARIABLE, "")
    dashboard, written = Dashboard(), []
    with listening(dashboard.app) as url:
        overrides = ["hydra.run.dir=/run"]
        submit.submit("countdown-tiny", overrides, url, True, lambda line: None, written.append)
    assert "".join(written) == dashboard.log
    assert "hpo_verl train countdown-tiny" in dashboard.submitted["entrypoint"]
    (package,) = dashboard.uploaded.values()
    with zipfile.ZipFile(io.BytesIO(package)) as files:
        assert "hpo_verl/runs/process.py" in files.namelist()
