"""What is sent to a cluster, what answers there, and how a job's end is told."""

import contextlib
import http.server
import shlex
import socket
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus

from hpo_verl.config import job
from hpo_verl.config.recipes import recipes_directory
from hpo_verl.errors import CheckFailedError, ConfigError, EnvironmentCheckError
from hpo_verl.launch import submit
from hpo_verl.launch.train import TrainingFailed

RUNTIME_ENV = recipes_directory() / "ray" / "runtime_env.yaml"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("https://head:443/", "https://head:443"),
        ("head:8265", "http://head:8265"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(text, url):
    assert submit.dashboard_address(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "auto",
        "head",
        "ray://head:10001",
        "http://head",
        "http://head:99999",
        "http://head:port",
        "http://user:word@head:8265",  # pragma: allowlist secret
        "http://head:8265/jobs",
        "file:///etc/passwd",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(ConfigError, match="--address"):
        submit.dashboard_address(text)


@contextlib.contextmanager
def server(status, body):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"", "no Ray dashboard .HTTP status 404"),
        (200, b"<html>", "no Ray dashboard answers"),
        (200, b"[]", "no Ray dashboard answers"),
        (200, b'{"ray_version": "new"}', "no Ray dashboard answers"),
        (200, b'{"ray_version": "2.53.0"}', "Ray 2.53.0; need >= 2.54"),
    ],
)
def test_something_else_answers(status, body, message):
    with server(status, body) as url, pytest.raises(EnvironmentCheckError, match=message):
        submit.connect(url)


def test_nothing_answers(monkeypatch):
    monkeypatch.setattr(submit, "CONNECT_SECONDS", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EnvironmentCheckError, match=f"{url}: no answer"):
            submit.connect(url)
        taken.listen()
        with pytest.raises(EnvironmentCheckError, match=f"{url}: no answer .timed out"):
            submit.connect(url)


def test_code_and_recipes_travel_and_nothing_else():
    with job.staged_code() as folder:
        assert folder.stat().st_mode & 0o077 == 0
        files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
        assert {file.parts[0] for file in files} == {"hpo_verl", "data_prep", "recipes"}
        assert {file.suffix for file in files} == {".py", ".yaml"}
        for name in (
            "hpo_verl/__main__.py",
            "data_prep/countdown/__main__.py",
            "recipes/algo/a_hpo.yaml",
        ):
            assert Path(name) in files
        assert sum((folder / file).stat().st_size for file in files) < 1 << 20
    assert not folder.exists()


def test_what_lies_between_the_code_stays(tmp_path):
    source = tmp_path / "source"
    (source / ".hidden").mkdir(parents=True)
    for name in ("code.py", ".env", "hf.key", "rows.parquet", ".hidden/code.py"):
        (source / name).write_text("")
    job._copy_code(source, tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").rglob("*")] == ["code.py"]


def test_environment_of_a_job(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_VERL_CACHE", "cache")
    monkeypatch.delenv("HPO_VERL_CHECKPOINTS", raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    assert job.job_environment() == {
        "NCCL_SOCKET_IFNAME": "eth1",
        "VERL_USE_EXTERNAL_MODULES": "hpo_verl.verl_plugin",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "HPO_VERL_CACHE": str(tmp_path / "cache"),
    }


class Cluster:
    """A client whose job says and becomes what a test wants."""

    def __init__(self, states, logs, exit_code=1, message=None):
        self.states, self.logs = iter(states), iter(logs)
        self.info = SimpleNamespace(driver_exit_code=exit_code, message=message)
        self.submitted, self.stopped = None, []

    def submit_job(self, **job):
        self.submitted = job
        self.files = {file.name for file in Path(job["runtime_env"]["working_dir"]).iterdir()}
        return "job-1"

    def get_job_status(self, job):
        state = next(self.states)
        if isinstance(state, BaseException):
            raise state
        return JobStatus(state)

    def get_job_logs(self, job):
        return next(self.logs)

    def get_job_info(self, job):
        return self.info

    def stop_job(self, job):
        self.stopped.append(job)


@pytest.fixture
def nodes():
    """Ray's resources of each node, which a test may change."""
    return [{"CPU": 9.0, "GPU": 1.0}]


@pytest.fixture
def run(monkeypatch, nodes):
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(submit, "node_resources", lambda address: nodes)

    def run(cluster, overrides=("hydra.run.dir=/run",), wait=True, go_on=False):
        monkeypatch.setattr(submit, "connect", lambda address: cluster)
        said, written = [], []
        arguments = ("countdown-tiny", list(overrides), "head:8265", wait)
        try:
            submit.submit(*arguments, said.append, written.append, go_on)
        finally:
            cluster.said, cluster.written = said, "".join(written)

    return run


def test_job_is_the_command_with_quoted_overrides(run):
    cluster = Cluster([], [])
    hostile = 'trainer.project_name="it\'s; touch $HOME/x"'
    run(cluster, ["hydra.run.dir=/run", hostile, "seed=3"], wait=False)
    words = shlex.split(cluster.submitted["entrypoint"])
    assert words == [
        *("python", "-m", "hpo_verl", "train", "countdown-tiny"),
        *(hostile, "seed=3", "hydra.run.dir=/run"),
    ]
    assert cluster.files == {"hpo_verl", "data_prep", "recipes"}
    assert "job: job-1" in cluster.said
    assert any("ray job stop --address http://head:8265 job-1" in line for line in cluster.said)


def test_a_job_goes_on_with_a_named_run_only(run):
    cluster = Cluster([], [])
    run(cluster, wait=False, go_on=True)
    assert cluster.submitted["entrypoint"].endswith(" hydra.run.dir=/run --resume")
    with pytest.raises(ConfigError, match="--resume: name the run's folder"):
        run(cluster, ["seed=3"], go_on=True)


def test_output_is_written_once_as_it_comes(run):
    states = ["PENDING", "RUNNING", ConnectionError("gone"), "RUNNING", "SUCCEEDED"]
    cluster = Cluster(states, ["", "a\n", "a\nb\n", "a\nb\nc\n"])
    run(cluster)
    assert cluster.written == "a\nb\nc\n"


LOG = "a\nerror: training ended with exit code 1: ValueError: no\nfull output: /run/train.log\n"


@pytest.mark.parametrize(
    ("states", "log", "code", "message", "kind", "told"),
    [
        (["FAILED"], LOG, 1, None, TrainingFailed, "ValueError: no\nfull output: /run/train.log"),
        (["FAILED"], "error: seed=-1: wrong\n", 2, None, ConfigError, "seed=-1: wrong"),
        (["FAILED"], "", None, "No such\nfile", TrainingFailed, "job-1 failed: file"),
        (["STOPPED"], "a\n", None, None, TrainingFailed, "job-1 stopped: a"),
    ],
)
def test_a_failure_ends_with_the_jobs_own_error(run, states, log, code, message, kind, told):
    with pytest.raises(kind) as caught:
        run(Cluster(states, [log], code, message))
    assert str(caught.value).endswith(told)


def test_ctrl_c_stops_the_job(run):
    cluster = Cluster(["RUNNING", KeyboardInterrupt(), "RUNNING", "STOPPED"], ["a\n"])
    with pytest.raises(KeyboardInterrupt):
        run(cluster)
    assert cluster.stopped == ["job-1"]


def test_a_cluster_that_is_gone(run, monkeypatch):
    monkeypatch.setattr(submit, "SILENCE_SECONDS", -1.0)
    with pytest.raises(TrainingFailed, match="has not answered"):
        run(Cluster([ConnectionError("refused")], []))


def test_wrong_input_never_reaches_the_cluster(run):
    cluster = Cluster([], [])
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
    nodes[:] = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in resources]
    cluster = Cluster([], [])
    with pytest.raises(CheckFailedError, match=message):
        run(cluster, ["hydra.run.dir=/run", *overrides])
    assert cluster.submitted is None


def test_three_cpus_of_the_rank_and_three_more_are_enough(run, nodes):
    nodes[:] = [{"CPU": 3.0}, {"CPU": 3.0, "GPU": 1.0}]
    cluster = Cluster([], [])
    run(cluster, wait=False)
    assert cluster.submitted is not None


def test_a_refused_job_is_one_error(run):
    cluster = Cluster([], [])
    cluster.submit_job = lambda **job: (_ for _ in ()).throw(RuntimeError("status 500\nmore"))
    with pytest.raises(EnvironmentCheckError, match=r"takes no job \(status 500"):
        run(cluster)


def packaged(tree, tmp_path):
    """Names of the files that `ray job submit` uploads from a folder."""
    create_package(
        str(tree),
        tmp_path / "package.zip",
        include_gitignore=True,
        excludes=list(OmegaConf.load(RUNTIME_ENV).excludes),
    )
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def test_plain_ray_uploads_all_code_of_this_repository(tmp_path):
    names = packaged(RUNTIME_ENV.parents[2], tmp_path)
    with job.staged_code() as folder:
        needed = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert needed <= names
    assert len(names - needed) < 20


def test_plain_ray_leaves_data_and_secrets(tmp_path):
    travels = ("hpo_verl/cli.py", "data_prep/__init__.py", "recipes/algo/a_hpo.yaml")
    stays = (
        *(".git/config", ".venv/bin/python", ".env", ".netrc", ".aws/credentials", "hf_token.txt"),
        *("runs/a/metrics.jsonl", "data/train.parquet", "policy/model.safetensors"),
        *("checkpoints/model_world_size_1_rank_0.pt", "id.pem", "prod.env", "secrets.yaml"),
        *("hpo_verl/__pycache__/cli.pyc", "build/lib/a.py", "my_secret.py", "tests/a.py"),
    )
    for name in (*travels, *stays):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text("x")
    assert packaged(tmp_path / "tree", tmp_path) == set(travels)
