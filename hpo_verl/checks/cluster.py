"""Whether a Ray cluster answers, and whether Ray's workers, here or there, can run the plugin."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from hpo_verl.checks.finding import Finding, error, ok, warning
from hpo_verl.checks.machine import Card, Node, check_machines
from hpo_verl.checks.packages import plugin_finding
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.checks.probe import LOCAL, find_answer, process_versions
from hpo_verl.config.recipes import nearest
from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.runs.process import ChildProcess, last_line, tail

NAME = "plugin in Ray"
PROBE_SECONDS = 180.0
CONNECT_SECONDS = 5.0
AUTO = "auto"
FORMS = "auto, HOST:PORT of the head (6379) or http://HOST:PORT of its dashboard (8265)"
SCHEMES = ("http", "https")
HOW_TO_ANSWER = (
    "install hpo-verl in the environment of Ray's processes; where a cluster asks for a token, "
    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; see `ray status`"
)


def split_address(address: str, forms: str = FORMS) -> tuple[str, str, int]:
    """Scheme (empty where none is given), host and port of an address.

    Args:
        address: as a user gives it.
        forms: what is permitted, for the message.

    Raises:
        ConfigError: not of a permitted form.
    """
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in SCHEMES:
        hint = nearest(scheme, SCHEMES)
        text = f"--address={address}: {scheme}:// is not permitted; {hint} Need {forms}"
        raise ConfigError(text)
    try:
        parts = urlsplit(address if separator else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as problem:
        raise ConfigError(f"--address={address}: {problem}; need {forms}") from problem
    if not host or not port or parts.path not in ("", "/") or parts.query or parts.username:
        offered = [AUTO] if AUTO in forms and not separator and ":" not in address else []
        hint = f"; {nearest(address, offered)}" if offered else ""
        raise ConfigError(f"--address={address}: must be {forms}{hint}")
    return parts.scheme, host, port


def is_elsewhere(address: str | None) -> bool:
    """Whether an address is that of another machine than this one."""
    if address is None or address == AUTO:
        return False
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    try:
        return socket.gethostbyname(split_address(address)[1]) not in own
    except (ConfigError, OSError):
        return True


def check_address(run: PlannedRun) -> list[Finding]:
    """Whether the given address is one, and somebody listens there; nothing without one.

    Raises:
        ConfigError: not of a permitted form.
        EnvironmentCheckError: nobody listens there.
    """
    address = run.given_address
    if address is None:
        return []
    if address == AUTO:
        # Ray leaves the address of a cluster's node in a file of its temporary folder.
        folder = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray"
        if not os.environ.get("RAY_ADDRESS") and not (folder / "ray_current_cluster").is_file():
            raise EnvironmentCheckError(
                f"--address={AUTO}: no Ray cluster runs on this machine; need HOST:PORT of the "
                "head, or start one with `ray start --head`"
            )
        return [ok(f"{address} answers")]
    _, host, port = split_address(address)
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as problem:
        text = f"--address={address}: nobody answers at {host} port {port} ({problem})"
        raise EnvironmentCheckError(f"{text}; need {FORMS}") from problem
    return [ok(f"{address} answers")]


def ask(run: PlannedRun) -> dict[str, Any]:
    """Run the probe and return its answer; `failure` says why there is none."""
    paths = read_paths(run) if run.address else []
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    if run.address is None:
        # Ray's own switch for one node with every server on loopback.
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if run.on_cpu:
        environment["VERL_PLATFORM"] = "cpu"
    deadline = time.monotonic() + PROBE_SECONDS

    def watch() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    with tempfile.TemporaryDirectory(prefix="hpo-doctor-") as folder:
        log = Path(folder) / "probe.log"
        try:
            with ChildProcess(
                lambda own: ["-m", "hpo_verl.checks.probe", run.address or LOCAL, str(own), *paths],
                lambda _: environment,
            ) as process:
                process.go(log)
                process.wait(watch)
        except TimeoutError:
            return {"failure": f"no answer within {PROBE_SECONDS:.0f} s: {last_line(tail(log))}"}
        return find_answer(log.read_text(errors="replace")) or {"failure": last_line(tail(log))}


def read_paths(run: PlannedRun) -> list[str]:
    """Files and folders that every machine of a cluster must see."""
    return [*(str(path) for _, path in run.data_files), str(run.policy_folder)]


def check_cluster(run: PlannedRun) -> list[Finding]:
    """The plugin in a worker of every node; on a cluster also files, versions and machines."""
    answer = ask(run)
    if "failure" in answer:
        where = f"at {run.address}" if run.address else "on this machine"
        return [error(f"Ray {where}: {answer['failure']}", HOW_TO_ANSWER, NAME)]
    nodes: Mapping[str, Any] = answer["nodes"]
    findings = []
    for address, state in nodes.items():
        fault = state.get("plugin")
        if "failure" in state:
            fault = (state["failure"], "install this version of hpo-verl on that machine")
        findings.append(plugin_finding(fault, NAME, f"node {address}: "))
    if run.address and all(finding.status == "ok" for finding in findings):
        findings += [_files(nodes), _versions(run, nodes)]
        findings += check_machines(run, [_node(state) for state in nodes.values()])
    return findings


def _files(nodes: Mapping[str, Any]) -> Finding:
    """Whether every node sees the data and the model."""
    name = "files on the nodes"
    missing = [f"{address}: {path}" for address, s in nodes.items() for path in s["missing"]]
    if missing:
        fix = "put them on a disk that all machines see, at this absolute path"
        return error(f"not there: {'; '.join(missing)}", fix, name)
    return ok(f"data and model are there on all {len(nodes)}", name)


def _versions(run: PlannedRun, nodes: Mapping[str, Any]) -> Finding:
    """Whether the nodes have vLLM where the run needs it, and else the packages of this process."""
    name = "versions on the nodes"
    without = [address for address, s in nodes.items() if "vllm" not in s["versions"]]
    if run.needs_vllm and without:
        fix = "pip install --constraint constraints-gpu.txt '.[gpu]' on these machines"
        return error(f"vllm is not installed on {', '.join(without)}", fix, name)
    here = process_versions()
    other = [
        f"{address}: {package} {state['versions'].get(package, 'absent')}, here {version}"
        for address, state in nodes.items()
        for package, version in here.items()
        if state["versions"].get(package) != version
    ]
    if other:
        return warning("; ".join(other), "the same environment on every machine", name)
    return ok(", ".join(f"{package} {version}" for package, version in here.items()), name)


def _node(state: Mapping[str, Any]) -> Node:
    """A node as Ray offers it: it may have been told to offer less than there is."""
    plain, resources = state["node"] or {"cards": [], "memory": 0.0}, state["resources"]
    cards = [Card(**card) for card in plain["cards"]][: int(resources.get("GPU", 0))]
    return Node(tuple(cards), resources.get("CPU", 0.0), plain["memory"])
