"""Whether a Ray cluster answers, and whether Ray's workers, here or there, can run the plugin.

`python -m hpo_verl.checks.cluster` asks the workers about themselves, in a process of its own that
can be ended. It reads one line of JSON: an address (`local` starts a Ray of its own on loopback), a
folder for the answer, and the files that the workers must see.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hpo_verl.checks.finding import Finding, error, ok, one_line, warning
from hpo_verl.checks.machine import Card, Node, check_machines
from hpo_verl.checks.packages import plugin_fault, plugin_finding
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.child import module_arguments
from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.installed import package_versions
from hpo_verl.runs.process import ChildProcess, last_line, tail

NAME = "plugin in Ray"
ANSWER_NAME = "answer.json"
PROBE_SECONDS, ANSWER_SECONDS = 180.0, 120.0
CONNECT_SECONDS = 5.0
AUTO, LOCAL = "auto", "local"
OPTION = "--address"
FORMS = "auto or HOST:PORT of the head (6379), on a node of the cluster"
HOW_TO_ANSWER = (
    "install hpo-verl in the environment of Ray's processes; where a cluster asks for a token, "
    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; see `ray status`"
)


def split_address(
    address: str, forms: str, schemes: tuple[str, ...] = (), name: str = OPTION
) -> tuple[str, str, int]:
    """Scheme (empty where none is given), host and port of an address.

    Raises:
        ConfigError: it has another scheme or form; names the permitted `forms`.
    """
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in schemes:
        raise ConfigError(f"{name}={address}: {scheme}:// is not permitted; need {forms}")
    try:
        parts = urlsplit(address if separator else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as problem:
        raise ConfigError(f"{name}={address}: {problem}; need {forms}") from problem
    if not host or not port or parts.path not in ("", "/") or parts.query or parts.username:
        raise ConfigError(f"{name}={address}: must be {forms}")
    return parts.scheme, host, port


def check_address(run: PlannedRun) -> list[Finding]:
    """Whether the address of a cluster is one, and somebody listens there; nothing without one."""
    given = run.given_address
    address = run.address if given is None else given
    if address is None:
        return []
    name = "Ray's address" if given is None else OPTION
    if address == AUTO:
        # Ray leaves the address of a cluster's node in a file of its temporary folder.
        folder = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray"
        if not os.environ.get("RAY_ADDRESS") and not (folder / "ray_current_cluster").is_file():
            raise EnvironmentCheckError(
                f"{name}={AUTO}: no Ray cluster runs on this machine; need HOST:PORT of the "
                "head, or start one with `ray start --head`"
            )
        return [ok(f"{address} answers")]
    _, host, port = split_address(address, FORMS, name=name)
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as problem:
        text = f"{name}={address}: nobody answers at {host} port {port} ({problem})"
        raise EnvironmentCheckError(f"{text}; need {FORMS}") from problem
    return [ok(f"{address} answers")]


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
    here = package_versions()
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


def ask(run: PlannedRun) -> dict[str, Any]:
    """Ask Ray's workers in a process of its own; `failure` says why there is no answer."""
    # What every machine of a cluster must see.
    paths = [str(path) for _, path in run.data_files] + [str(run.policy_folder)]
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

    with ChildProcess(
        module_arguments("hpo_verl.checks.cluster"), lambda _: environment
    ) as process:
        log, answer = process.temporary / "probe.log", process.temporary / ANSWER_NAME
        process.go(log, json.dumps([run.address or LOCAL, str(process.temporary), *paths]))
        try:
            process.wait(watch)
        except TimeoutError:
            return {"failure": f"no answer within {PROBE_SECONDS:.0f} s: {last_line(tail(log))}"}
        if answer.is_file():
            return json.loads(answer.read_text())
        return {"failure": process.failure()}


def node_state(paths: Sequence[str]) -> dict[str, Any]:
    """What a worker process knows of its machine and its environment, as plain values.

    `plugin` is a fault or null, `missing` are those of the paths that are not there.
    """
    try:
        node = asdict(Node.here())
    except EnvironmentCheckError:
        node = None
    return {
        "plugin": plugin_fault(),
        "node": node,
        "versions": package_versions(),
        "missing": [path for path in paths if not Path(path).expanduser().exists()],
    }


def ask_nodes(address: str, temporary: str, paths: Sequence[str]) -> dict[str, Any]:
    """Run `node_state` in one worker of every node.

    Returns:
        `nodes`: node's address -> its state with Ray's `resources`, or with a `failure`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"log_to_driver": False}
    if address == LOCAL:
        options |= {"num_cpus": 1, "include_dashboard": False, "_temp_dir": temporary}
        options["_node_ip_address"] = "127.0.0.1"
    ray.init(address=address, **options)
    try:
        # No CPU is asked for, so that a busy cluster answers too.
        task = ray.remote(num_cpus=0, max_retries=0)(node_state)
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[task.options(scheduling_strategy=there).remote(list(paths))] = node
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
        nodes = {}
        for reference, node in asked.items():
            state: Any = {"failure": f"no answer from a worker within {ANSWER_SECONDS:.0f} s"}
            if reference in ready:
                try:
                    state = ray.get(reference)
                except Exception as problem:
                    state = {"failure": last_line(str(problem))[:500]}
            nodes[node["NodeManagerAddress"]] = {**state, "resources": node["Resources"]}
        return {"nodes": nodes}
    finally:
        ray.shutdown()


if __name__ == "__main__":
    place, temporary, *files = json.loads(sys.stdin.readline())
    try:
        said = ask_nodes(place, temporary, files)
    except Exception as problem:
        said = {"failure": f"{type(problem).__name__}: {one_line(problem)}"}
    (Path(temporary) / ANSWER_NAME).write_text(json.dumps(said))
