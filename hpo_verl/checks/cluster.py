"""Whether Ray's workers can run the plugin, here or on a cluster."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpo_verl.checks.finding import Finding, error, ok, warning
from hpo_verl.checks.machine import Card, Node, check_machines
from hpo_verl.checks.plugin import judge
from hpo_verl.checks.probe import LOCAL, find_answer, process_versions
from hpo_verl.checks.subject import Subject
from hpo_verl.runs.process import ChildProcess, last_line

NAME = "plugin in Ray"
PROBE_SECONDS = 180.0


def environment(subject: Subject) -> dict[str, str]:
    """Environment variables of the probe's processes."""
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    if subject.address is None:
        # Ray's own switch for one node with every server on loopback.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if subject.on_cpu:
        variables["VERL_PLATFORM"] = "cpu"
    return variables


def read_paths(subject: Subject) -> list[str]:
    """Files and folders that every machine of a cluster must see."""
    data = [str(path) for _, path in subject.data_files]
    return [*data, str(subject.policy_folder)]


def ask(subject: Subject) -> dict[str, Any]:
    """Run the probe and return its answer; `failure` says why there is none."""
    arguments = ["-m", "hpo_verl.checks.probe", "--address", subject.address or LOCAL]
    if subject.address:
        arguments += [part for path in read_paths(subject) for part in ("--path", path)]
    deadline = time.monotonic() + PROBE_SECONDS

    def watch() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    with tempfile.TemporaryDirectory(prefix="hpo-doctor-") as folder:
        log = Path(folder) / "probe.log"
        try:
            with ChildProcess(
                lambda own: [*arguments, "--temp-dir", str(own)], lambda _: environment(subject)
            ) as process:
                process.go(log)
                process.wait(watch)
        except TimeoutError:
            return {"failure": f"no answer within {PROBE_SECONDS:.0f} s: {last_line(log)}"}
        answer = find_answer(log.read_text(errors="replace"))
        return answer or {"failure": last_line(log)}


def check_cluster(subject: Subject) -> list[Finding]:
    """The plugin in a worker of every node; on a cluster also files, versions and machines."""
    answer = ask(subject)
    if "failure" in answer:
        where = f"at {subject.address}" if subject.address else "on this machine"
        return [
            error(
                NAME,
                f"Ray {where}: {answer['failure']}",
                "install hpo-verl in the environment of Ray's processes; where a cluster asks for "
                "a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; see `ray status`",
            )
        ]
    nodes: Mapping[str, Any] = answer["nodes"]
    findings = list(_plugin(nodes))
    if subject.address and not any(finding.status == "error" for finding in findings):
        findings += [check_files(nodes), check_versions(subject, nodes)]
        findings += check_machines(subject, [_node(state) for state in nodes.values()])
    return findings


def _plugin(nodes: Mapping[str, Any]) -> Iterator[Finding]:
    for address, state in nodes.items():
        if "failure" in state:
            yield error(
                NAME,
                f"node {address}: {state['failure']}",
                "install this version of hpo-verl on that machine",
            )
            continue
        found = judge(NAME, state["plugin"])
        yield Finding(NAME, found.status, f"node {address}: {found.detail}", found.fix)


def check_files(nodes: Mapping[str, Any]) -> Finding:
    """Whether every node sees the data and the model."""
    missing = [f"{address}: {path}" for address, s in nodes.items() for path in s["missing"]]
    if missing:
        return error(
            "files on the nodes",
            f"not there: {'; '.join(missing)}",
            "put them on a disk that all machines see, at this absolute path",
        )
    return ok("files on the nodes", f"data and model are there on all {len(nodes)}")


def check_versions(subject: Subject, nodes: Mapping[str, Any]) -> Finding:
    """Whether the nodes have vLLM where the run needs it, and else the packages of this process."""
    name = "versions on the nodes"
    if subject.needs_vllm:
        without = [address for address, s in nodes.items() if "vllm" not in s["versions"]]
        if without:
            fix = "pip install --constraint constraints-gpu.txt '.[gpu]' on these machines"
            return error(name, f"vllm is not installed on {', '.join(without)}", fix)
    here = process_versions()
    other = [
        f"{address}: {package} {state['versions'].get(package, 'absent')}, here {version}"
        for address, state in nodes.items()
        for package, version in here.items()
        if state["versions"].get(package) != version
    ]
    if other:
        return warning(name, "; ".join(other), "the same environment on every machine")
    return ok(name, ", ".join(f"{package} {version}" for package, version in here.items()))


def _node(state: Mapping[str, Any]) -> Node:
    """A node as Ray offers it: it may have been told to offer less than there is."""
    plain, resources = state["node"] or {"cards": [], "memory": 0.0}, state["resources"]
    cards = [Card(**card) for card in plain["cards"]][: int(resources.get("GPU", 0))]
    return Node(tuple(cards), resources.get("CPU", 0.0), plain["memory"])
