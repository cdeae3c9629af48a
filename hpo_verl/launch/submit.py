"""`hpo-verl submit`: a recipe as a job on a Ray cluster, through Ray's job API.

The job runs `hpo-verl train` on the cluster, so that its data, checks, summary and picture are
made there. Ray uploads the code and the recipes, see `cluster.job_runtime_env`.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from packaging.version import Version

from hpo_verl.checks import machine
from hpo_verl.checks.cluster import split_address
from hpo_verl.checks.finding import one_line, raise_first_error
from hpo_verl.checks.list import ANYWHERE, run_checks
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config import cluster
from hpo_verl.config.overrides import (
    RUN_FOLDER_KEY,
    names_run_folder,
    setting,
    without_run_folder,
)
from hpo_verl.config.recipes import from_anywhere
from hpo_verl.errors import EXIT_BAD_INPUT, ConfigError, EnvironmentCheckError, TrainingFailed
from hpo_verl.installed import LOWEST_RAY
from hpo_verl.launch.resume import FLAG
from hpo_verl.runs.process import last_line

DASHBOARD = "the URL of the cluster's dashboard, such as http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
CONNECT_SECONDS = 10.0
POLL_SECONDS = 2.0
# After this time without an answer the cluster is given up; its job may still run.
SILENCE_SECONDS = 60.0


def dashboard_address(text: str) -> str:
    """The URL of a cluster's dashboard, as `http://HOST:PORT`."""
    scheme, host, port = split_address(text, DASHBOARD, ("http", "https"))
    return f"{scheme or 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def connect(address: str) -> Any:
    """A `ray.job_submission.JobSubmissionClient` of a dashboard, see `dashboard_address`.

    Raises:
        EnvironmentCheckError: nothing, or no recent enough Ray, answers there, or it
            asks for a token.
    """

    def refusal(text: str) -> EnvironmentCheckError:
        return EnvironmentCheckError(f"--address={address}: {text}")

    # Ray's client waits without a time limit, and takes any version.
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_SECONDS) as reply:  # noqa: S310
            found = str(json.load(reply)["ray_version"])
        too_old = Version(found) < Version(LOWEST_RAY)
    except Exception as error:
        found, too_old = "", False
        # Where a token is asked for, only Ray's client below knows how to give it.
        if getattr(error, "code", None) not in (401, 403):
            raise refusal(
                f"no Ray dashboard answers ({one_line(error)}); give the URL of the dashboard "
                "that `ray start --head` printed, or of a tunnel to it"
            ) from error
    if too_old:
        raise refusal(f"Ray {found}; need >= {LOWEST_RAY} (CVE-2026-27482)")
    # Ray reads this variable before any address that it is given.
    os.environ[ADDRESS_VARIABLE] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise refusal(
            "the cluster asks for its token: set RAY_AUTH_MODE=token, and give the token in "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    except Exception as error:
        raise refusal(one_line(error)) from error


def living_nodes(address: str) -> list[machine.Node]:
    """The nodes of a cluster by Ray's resources, which count a CPU run's ranks as GPUs too."""
    from ray.util import state

    try:
        found: Any = state.list_nodes(
            address=address, filters=[("state", "=", "ALIVE")], limit=10_000
        )
    except Exception as error:
        raise EnvironmentCheckError(f"--address={address}: {one_line(error)}") from error
    card, resources = machine.Card("GPU", math.inf, 0.0), [node.resources_total for node in found]
    return [
        machine.Node((card,) * int(has.get("GPU", 0)), has.get("CPU", 0.0), math.inf)
        for has in resources
    ]


def submit(
    recipe: str,
    overrides: Sequence[str],
    address: str,
    wait: bool,
    announce: Callable[[str], None],
    write: Callable[[str], None],
    resume: bool = False,
) -> None:
    """Submit a recipe as a job, and, with `wait`, follow it to its end. Ctrl-C stops the job.

    `announce` is told what happens, a line at a time; `write` is given the job's output as it
    comes. With `resume` the overrides must name the run folder, which the job continues.

    Raises:
        HpoVerlError: wrong input, found before or by the job before training starts.
        TrainingFailed: the job failed or was stopped.
    """
    address = dashboard_address(address)
    # The job's own `train` checks files and machines.
    planned = PlannedRun(recipe, tuple(overrides), given_address=address)
    for line in raise_first_error(run_checks(planned, ANYWHERE)):
        announce(line)
    overrides, folder = planned.hydra_overrides, planned.run_folder
    if resume and not names_run_folder(overrides):
        raise ConfigError(f"{FLAG}: name the run's folder on the cluster with {RUN_FOLDER_KEY}=")
    client = connect(address)
    nodes = living_nodes(address)
    raise_first_error([machine.check_cards(planned, nodes), machine.check_cpus(planned, nodes)])
    # A file is read on the cluster, from a disk that it shares as it does the data's.
    command = [
        "python",
        "-m",
        "hpo_verl",
        "train",
        from_anywhere(recipe),
        *without_run_folder(overrides),
    ]
    command += [setting(RUN_FOLDER_KEY, str(folder)), *([FLAG] if resume else [])]
    try:
        job = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env=cluster.job_runtime_env(),
            metadata={"recipe": recipe, "run_folder": str(folder)},
        )
    except Exception as error:
        raise EnvironmentCheckError(
            f"--address={address}: the cluster takes no job ({one_line(error)})"
        ) from error
    announce(f"job: {job}")
    announce(f"run folder, on the cluster: {folder}")
    for verb in ("logs --follow", "stop"):
        announce(f"  ray job {verb} --address {address} {job}")
    if not wait:
        return
    try:
        info, log = follow(client, job, write)
    except KeyboardInterrupt:
        announce(f"stopping {job}")
        try:
            client.stop_job(job)
        except Exception as error:
            raise TrainingFailed(
                f"job {job}: the cluster does not answer ({one_line(error)}); the job may still run"
            ) from error
        follow(client, job, lambda text: None)
        raise
    if info.status != "SUCCEEDED":
        text = f"job {job} {info.status.lower()}: {reported_error(log, info.message)}"
        raise (ConfigError if info.driver_exit_code == EXIT_BAD_INPUT else TrainingFailed)(text)


def follow(client: Any, job: str, write: Callable[[str], None]) -> tuple[Any, str]:
    """Write a job's output until the job has ended; return Ray's `JobDetails` and all output.

    Raises:
        TrainingFailed: the cluster does not answer any more.
    """
    written, answered = 0, time.monotonic()
    while True:
        try:
            # In this order, or the last lines would be missing.
            info, log = client.get_job_info(job), client.get_job_logs(job)
        except Exception as error:
            if time.monotonic() - answered > SILENCE_SECONDS:
                raise TrainingFailed(
                    f"job {job}: the cluster has not answered for {SILENCE_SECONDS:.0f} s "
                    f"({one_line(error)}); the job may still run"
                ) from error
        else:
            write(log[written:])
            written, answered = len(log), time.monotonic()
            if info.status.is_terminal():
                return info, log
        time.sleep(POLL_SECONDS)


def reported_error(log: str, message: str | None) -> str:
    """The job's own last `error:` and what follows it, or its last line, or Ray's message."""
    lines = log.splitlines()
    for position in reversed(range(len(lines))):
        if lines[position].startswith("error: "):
            return "\n".join(lines[position:]).removeprefix("error: ").rstrip()
    return last_line(log.strip() or message or "")
