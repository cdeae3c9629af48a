"""What Ray's workers say; once with a real Ray on loopback, otherwise with faked answers."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
from findings import only
from model_sizes import MODEL_SIZES
from waiting import wait_until

from hpo_verl.checks import cluster
from hpo_verl.checks.cluster import (
    ask,
    check_address,
    check_cluster,
    split_address,
)
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.installed import package_versions
from hpo_verl.runs.process import MARKER, end_processes, marked_processes

SIZE = MODEL_SIZES["Qwen/Qwen2.5-7B-Instruct"]


def state(**changes):
    return {
        "plugin": None,
        "node": {
            "cards": [{"name": "H100", "total": 79.6, "used": 0.0}] * 8,
            "cpus": 64,
            "memory": 500.0,
        },
        "versions": {**package_versions(), "vllm": "0.24.0"},
        "missing": [],
        "resources": {"CPU": 64.0, "GPU": 8.0},
        **changes,
    }


@pytest.fixture
def examine(planned, monkeypatch):
    monkeypatch.setattr(PlannedRun, "size", SIZE)

    def run(answer, address="auto"):
        monkeypatch.setattr(cluster, "ask", lambda examined: answer)
        examined = planned(recipe="countdown4-7b", hardware="2x8gpu", address=address)
        return check_cluster(examined)

    return run


def test_two_sound_nodes(examine):
    findings = examine({"nodes": {"10.0.0.1": state(), "10.0.0.2": state()}})
    assert {f.status for f in findings} == {"ok"}
    assert [f.detail.split(":")[0] for f in findings if f.name == cluster.NAME] == [
        "node 10.0.0.1",
        "node 10.0.0.2",
    ]
    assert only(findings, "cpus").detail.endswith("= 58; there are 64 + 64")
    assert only(findings, "files on the nodes").detail == "data and model are there on all 2"


def test_no_answer(examine):
    (finding,) = examine({"failure": "ConnectionError: no route"})
    assert (finding.name, finding.status) == (cluster.NAME, "error")
    assert finding.detail == "Ray at auto: ConnectionError: no route"


def test_one_node_without_the_plugin_hides_nothing_of_the_other(examine):
    absent = ["no entry point", "pip install hpo-verl"]
    findings = examine({"nodes": {"10.0.0.1": state(), "10.0.0.2": state(plugin=absent)}})
    assert [f.status for f in findings] == ["ok", "error"]
    assert findings[1].detail.startswith("node 10.0.0.2: no entry point")


def test_a_worker_that_cannot_import_the_package(examine):
    failure = {"failure": "ModuleNotFoundError: No module named 'hpo_verl'", "resources": {}}
    (finding,) = examine({"nodes": {"10.0.0.1": failure}})
    assert finding.status == "error"
    assert "node 10.0.0.1: ModuleNotFoundError" in finding.detail


def test_files_that_one_node_does_not_see(examine):
    nodes = {"10.0.0.1": state(), "10.0.0.2": state(missing=["/data/train.parquet"])}
    finding = only(examine({"nodes": nodes}), "files on the nodes")
    assert (finding.status, finding.detail) == (
        "error",
        "not there: 10.0.0.2: /data/train.parquet",
    )


def test_other_versions_on_a_node(examine):
    nodes = {"10.0.0.1": state(), "b": state()}
    nodes["10.0.0.1"]["versions"]["verl"] = "0.8.0"
    finding = only(examine({"nodes": nodes}), "versions on the nodes")
    assert finding.status == "warning"
    assert finding.detail == f"10.0.0.1: verl 0.8.0, here {package_versions()['verl']}"


def test_vllm_that_a_node_lacks(examine):
    nodes = {"a": state(), "b": state(versions=package_versions())}
    finding = only(examine({"nodes": nodes}), "versions on the nodes")
    assert (finding.status, finding.detail) == ("error", "vllm is not installed on b")


def test_cards_that_ray_was_told_to_keep_back(examine):
    nodes = {"a": state(), "b": state(resources={"CPU": 8.0, "GPU": 4.0})}
    findings = examine({"nodes": nodes})
    assert "this cluster has 8 + 4" in only(findings, "cards").detail
    assert only(findings, "cards").status == "error"
    # A node that could not tell what it has counts as one without cards.
    findings = examine({"nodes": {"a": state(), "b": state(node=None)}})
    assert "this cluster has 8 + 0" in only(findings, "cards").detail


def test_a_ray_of_ones_own_is_started_asked_and_gone(planned, monkeypatch):
    markers = []
    real = cluster.ChildProcess.__enter__
    monkeypatch.setattr(
        cluster.ChildProcess,
        "__enter__",
        lambda self: markers.append(self.marker) or real(self),
    )
    findings = check_cluster(planned())
    assert [(f.name, f.status) for f in findings] == [(cluster.NAME, "ok")], findings
    assert findings[0].detail.startswith("node 127.0.0.1: loaded by verl")
    assert marked_processes(markers[0]) == []


def test_a_ray_that_does_not_start_in_time(planned, monkeypatch):
    monkeypatch.setattr(cluster, "PROBE_SECONDS", 0.0)
    assert ask(planned())["failure"].startswith("no answer within 0 s")


# Ray's switch for loopback also forbids `ray start`; only this process is told otherwise.
HEAD = """
from ray._private import ray_constants, services
services.get_node_ip_address = lambda address=None: "127.0.0.1"
ray_constants.ENABLE_RAY_CLUSTER = True
from ray.scripts.scripts import main
main()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(process, port, log):
    def answers():
        assert process.poll() is None, log.read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    wait_until(answers, 120, log.read_text)


@pytest.fixture
def head(tmp_path, monkeypatch):
    """The port of a real head of a cluster on loopback."""
    port, marker = free_port(), uuid.uuid4().hex
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # A head asks for a token; the doctor's processes find it where Ray looks for it.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", 2 * uuid.uuid4().hex)
    # Short, since Ray puts sockets below it.
    folder = tempfile.mkdtemp(prefix="hpo-")
    environment = {
        **os.environ,
        MARKER: marker,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "VERL_PLATFORM": "cpu",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = tmp_path / "head.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", HEAD, "start", "--head", "--block", f"--port={port}"),
                *("--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=4"),
                *(f"--temp-dir={folder}", "--object-store-memory=100000000"),
            ],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_port(process, port, log)
        yield port
    finally:
        end_processes(lambda: marked_processes(marker))
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_real_cluster_is_asked_through_its_head(planned, head):
    run = planned({"data.val_files": "/nowhere/val.parquet"}, address=f"127.0.0.1:{head}")
    answer = ask(run)
    assert "nodes" in answer, answer
    (state,) = answer["nodes"].values()
    assert state["plugin"] is None, answer
    assert state["missing"] == ["/nowhere/val.parquet"]
    assert state["resources"]["CPU"] == 4
    assert state["versions"]["verl"] == package_versions()["verl"]
    assert state["node"]["memory"] > 0


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("", "10.0.0.1", 6379)),
        ("head.cluster:6379", ("", "head.cluster", 6379)),
        ("http://127.0.0.1:8265", ("http", "127.0.0.1", 8265)),
        ("https://head:8265/", ("https", "head", 8265)),
        ("[::1]:6379", ("", "::1", 6379)),
    ],
)
def test_permitted_forms(address, expected):
    assert split_address(address, "any", ("http", "https")) == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("autoo", "--address=autoo: must be auto or HOST:PORT of the head"),
        ("10.0.0.1", "--address=10.0.0.1: must be auto or HOST:PORT of the head"),
        ("10.0.0.1:seven", "--address=10.0.0.1:seven: "),
        ("10.0.0.1:99999", "--address=10.0.0.1:99999: Port out of range"),
        ("ray://10.0.0.1:10001", "ray:// is not permitted"),
        ("http://10.0.0.1:8265", "http:// is not permitted; need auto or HOST:PORT of the head"),
        ("10.0.0.1:6379/jobs", "must be auto or HOST:PORT"),
        ("10.0.0.1:6379?x=1", "must be auto or HOST:PORT"),
        ("user:word@head:6379", "must be auto"),  # pragma: allowlist secret
        ("", "--address=: must be auto"),
    ],
)
def test_what_is_no_address(address, message):
    with pytest.raises(ConfigError, match=message):
        check_address(PlannedRun("any", (), Path(), address))


@pytest.mark.parametrize("address", ["https://10.0.0.1:8265", "ray://head:10001", "bogus", " "])
def test_the_address_of_the_environment_is_looked_at_too(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"^Ray's address={address}: .* of the head"):
        check_address(PlannedRun("countdown-tiny", ()))


def test_nobody_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EnvironmentCheckError, match=f"nobody answers at 127.0.0.1 port {port}"):
        check_address(PlannedRun("any", (), Path(), f"127.0.0.1:{port}"))


def test_somebody_answers():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        check_address(PlannedRun("any", (), Path(), f"127.0.0.1:{server.getsockname()[1]}"))


def test_auto_needs_a_cluster_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(EnvironmentCheckError, match="no Ray cluster runs on this machine"):
        check_address(PlannedRun("any", (), Path(), "auto"))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    check_address(PlannedRun("any", (), Path(), "auto"))
