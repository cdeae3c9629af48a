"""Asks Ray's workers about themselves; a process of its own, so that it can be ended.

    python -m hpo_verl.checks.probe ADDRESS TEMPORARY_FOLDER [PATH]...

prints one line: a mark and JSON. `local` starts a Ray of its own on loopback;
any other address joins a cluster, or, for `http://`, sends itself there as a job.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpo_verl.checks.finding import first_line
from hpo_verl.checks.machine import Node
from hpo_verl.checks.packages import plugin_fault
from hpo_verl.config.cluster import job_runtime_env
from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.installed import package_versions
from hpo_verl.runs.process import last_line

MARK = "hpo_verl.checks.probe: "
LOCAL = "local"
ANSWER_SECONDS = 120.0
POLL_SECONDS = 0.5
# What a cluster says of a job while the agent of its head is still starting.
NOT_YET = "try again later"


def process_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, in this process."""
    return {"python": platform.python_version(), **package_versions()}


def node_state(paths: Sequence[str]) -> dict[str, Any]:
    """What a worker process knows of its machine and its environment.

    Returns:
        Plain values: `plugin` (see `plugin_fault`), `node` (see `Node`; null where it cannot be
        told), `versions`, and `missing`, those of the paths that are not there.
    """
    try:
        node = asdict(Node.here())
    except EnvironmentCheckError:
        node = None
    return {
        "plugin": plugin_fault(),
        "node": node,
        "versions": process_versions(),
        "missing": [path for path in paths if not Path(path).expanduser().exists()],
    }


def ask_nodes(address: str, temporary: str, paths: Sequence[str]) -> dict[str, Any]:
    """Run `node_state` in one worker of every node; `local` starts a Ray in a temporary folder.

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
                except Exception as error:
                    state = {"failure": last_line(str(error))[:500]}
            nodes[node["NodeManagerAddress"]] = {**state, "resources": node["Resources"]}
        return {"nodes": nodes}
    finally:
        ray.shutdown()


def ask_by_job(address: str, paths: Sequence[str]) -> dict[str, Any]:
    """Send this module as a job to a cluster's dashboard, and return what it prints there."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    command = ["python3", "-m", "hpo_verl.checks.probe", "auto", "", *paths]
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            job = client.submit_job(entrypoint=shlex.join(command), runtime_env=job_runtime_env())
            break
        except RuntimeError as error:
            if NOT_YET not in str(error) or time.monotonic() > deadline:
                raise
    try:
        while not client.get_job_status(job).is_terminal():
            if time.monotonic() > deadline:
                return {"failure": f"the job {job} has not ended within {ANSWER_SECONDS:.0f} s"}
            time.sleep(POLL_SECONDS)
        log = client.get_job_logs(job)
        return find_answer(log) or {"failure": f"the job {job} failed: {last_line(log)[:500]}"}
    finally:
        if not client.get_job_status(job).is_terminal():
            client.stop_job(job)


def find_answer(text: str) -> dict[str, Any] | None:
    """The JSON behind the mark in a log; None without it."""
    for line in reversed(text.splitlines()):
        _, mark, answer = line.partition(MARK)
        if mark:
            return json.loads(answer)
    return None


def main(address: str, temporary: str, *paths: str) -> None:
    """Run the probe and print its answer."""
    try:
        if address.startswith("http"):
            answer = ask_by_job(address, paths)
        else:
            answer = ask_nodes(address, temporary, paths)
    except Exception as error:
        answer = {"failure": f"{type(error).__name__}: {first_line(error)}"}
    print(f"{MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main(*sys.argv[1:])
