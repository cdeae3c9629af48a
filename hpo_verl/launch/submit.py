"""`hpo-verl submit`: a recipe as a job on a Ray cluster.

The job runs `hpo-verl train` on the cluster, so that its data, checks, summary
and picture are made there. What is uploaded are the packages and the recipes;
what workers need to load them is in `recipes/ray/runtime_env.yaml`.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from packaging.version import InvalidVersion, Version

from hpo_verl.checks import machine
from hpo_verl.checks.checklist import run_checks
from hpo_verl.checks.composition import compose_resolved
from hpo_verl.checks.finding import demand
from hpo_verl.checks.subject import Subject
from hpo_verl.config.job import job_environment, staged_code
from hpo_verl.errors import ConfigError, EnvironmentCheckError
from hpo_verl.launch.resume import FLAG
from hpo_verl.launch.train import (
    RUN_FOLDER_KEY,
    TrainingFailed,
    named_folder,
    run_folder,
)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
# CVE-2026-27482: older dashboards can be made to act by a web page.
LOWEST_RAY = "2.54"
CONNECT_SECONDS = 10.0
POLL_SECONDS = 1.0
STOP_SECONDS = 90.0
# A cluster that has not answered for so long is given up; its job may still run.
SILENCE_SECONDS = 60.0
EXIT_BAD_INPUT = 2


def dashboard_address(text: str) -> str:
    """The URL of a cluster's dashboard, as `http://HOST:PORT`.

    Raises:
        ConfigError: it is something else, such as Ray's own `ray://` or `HOST:6379`.
    """
    url = urlsplit(text if "://" in text else f"http://{text}")
    try:
        valid = url.scheme in ("http", "https") and url.hostname and url.port
    except ValueError:
        valid = False
    if not valid or url.path.strip("/") or url.query or url.username:
        raise ConfigError(
            f"--address {text}: must be the URL of the cluster's dashboard, http://HOST:PORT, "
            f"such as {DEFAULT_ADDRESS}"
        )
    return f"{url.scheme}://{url.netloc}"


def connect(address: str) -> Any:
    """Connect to a cluster's dashboard.

    Args:
        address: see `dashboard_address`.

    Returns:
        A `ray.job_submission.JobSubmissionClient`.

    Raises:
        EnvironmentCheckError: nothing, or no recent enough Ray, answers there, or it
            asks for a token.
    """
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_SECONDS) as reply:  # noqa: S310
            found = str(json.load(reply)["ray_version"])
        if Version(found) < Version(LOWEST_RAY):
            raise EnvironmentCheckError(
                f"--address {address}: Ray {found}; need >= {LOWEST_RAY} (CVE-2026-27482)"
            )
    except urllib.error.HTTPError as error:
        # Where tokens are asked for, only Ray's client below knows how to give one.
        if error.code not in (401, 403):
            raise EnvironmentCheckError(
                f"--address {address}: no Ray dashboard (HTTP status {error.code})"
            ) from error
    except OSError as error:
        raise EnvironmentCheckError(
            f"--address {address}: no answer ({error.strerror or error}); give the URL of the "
            "dashboard that `ray start --head` printed, or of a tunnel to it"
        ) from error
    except (ValueError, KeyError, TypeError, InvalidVersion) as error:
        raise EnvironmentCheckError(f"--address {address}: no Ray dashboard answers") from error
    # Ray reads this variable before any address that it is given.
    os.environ[ADDRESS_VARIABLE] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise EnvironmentCheckError(
            f"--address {address}: the cluster asks for its token: set RAY_AUTH_MODE=token, and "
            "give the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    except Exception as error:
        raise EnvironmentCheckError(f"--address {address}: {_first_line(error)}") from error


def node_resources(address: str) -> list[dict[str, float]]:
    """Ray's total resources of each living node of a cluster.

    Raises:
        EnvironmentCheckError: the cluster does not tell.
    """
    from ray.util.state import list_nodes

    try:
        nodes: Any = list_nodes(address=address, filters=[("state", "=", "ALIVE")], limit=10_000)
    except Exception as error:
        raise EnvironmentCheckError(f"--address {address}: {_first_line(error)}") from error
    return [dict(node.resources_total) for node in nodes]


def submit(
    recipe: str,
    overrides: Sequence[str],
    address: str,
    wait: bool,
    announce: Callable[[str], None],
    write: Callable[[str], None],
    go_on: bool = False,
) -> None:
    """Submit a recipe as a job, and follow it to its end.

    Ctrl-C stops the job.

    Args:
        recipe: name of a recipe.
        overrides: Hydra overrides.
        address: of the cluster's dashboard.
        wait: whether to follow the job.
        announce: told what happens, one line each.
        write: given the job's output as it comes.
        go_on: with the run in the run folder, which must be named.

    Raises:
        HpoVerlError: wrong input, found before or by the job before training starts.
        TrainingFailed: the job failed or was stopped.
    """
    address = dashboard_address(address)
    if go_on and named_folder(overrides) is None:
        raise ConfigError(f"{FLAG}: name the run's folder on the cluster with {RUN_FOLDER_KEY}=")
    folder = run_folder(recipe, overrides)
    config, found = compose_resolved(recipe, overrides)
    # Files and machines are looked at by the job's own `train`.
    subject = Subject(recipe, tuple(overrides), config, folder, address, here=False)
    for line in [*demand(found), *demand(run_checks(subject))]:
        announce(line)
    client = connect(address)
    nodes = [_node(resources) for resources in node_resources(address)]
    demand([machine.check_cards(subject, nodes), machine.check_cpus(subject, nodes)])
    others = [text for text in overrides if not text.lstrip("+").startswith(RUN_FOLDER_KEY)]
    command = ["python", "-m", "hpo_verl", "train", recipe, *others, f"{RUN_FOLDER_KEY}={folder}"]
    command += [FLAG] if go_on else []
    with staged_code() as code:
        try:
            job = client.submit_job(
                entrypoint=shlex.join(command),
                runtime_env={"working_dir": str(code), "env_vars": job_environment()},
                metadata={"recipe": recipe, "run_folder": str(folder)},
            )
        except Exception as error:
            raise EnvironmentCheckError(
                f"--address {address}: the cluster takes no job ({_first_line(error)})"
            ) from error
    announce(f"job: {job}")
    announce(f"run folder, on the cluster: {folder}")
    for verb in ("logs --follow", "stop"):
        announce(f"  ray job {verb} --address {address} {job}")
    if not wait:
        return
    try:
        status, log = follow(client, job, write)
    except KeyboardInterrupt:
        announce(f"stopping {job}")
        stop(client, job)
        raise
    if status != "SUCCEEDED":
        info = client.get_job_info(job)
        text = f"job {job} {status.lower()}: {reported_error(log, info.message)}"
        raise (ConfigError if info.driver_exit_code == EXIT_BAD_INPUT else TrainingFailed)(text)


def _node(resources: Mapping[str, float]) -> machine.Node:
    """A node by Ray's resources, which count a CPU run's ranks as GPUs too."""
    cards = (machine.Card("GPU", math.inf, 0.0),) * int(resources.get("GPU", 0))
    return machine.Node(cards, resources.get("CPU", 0.0), math.inf)


def follow(client: Any, job: str, write: Callable[[str], None]) -> tuple[str, str]:
    """Write a job's output as it comes, until the job has ended.

    Returns:
        Ray's word for how it ended, and the whole output.

    Raises:
        TrainingFailed: the cluster does not answer any more.
    """
    shown, log, answered = 0, "", time.monotonic()
    while True:
        try:
            # In this order, or the last lines would be missing.
            status = client.get_job_status(job)
            log = client.get_job_logs(job)
        except Exception as error:
            if time.monotonic() - answered > SILENCE_SECONDS:
                raise TrainingFailed(
                    f"job {job}: the cluster has not answered for {SILENCE_SECONDS:.0f} s "
                    f"({_first_line(error)}); the job may still run"
                ) from error
        else:
            answered = time.monotonic()
            write(log[shown:])
            shown = len(log)
            if status.is_terminal():
                return str(status.value), log
        time.sleep(POLL_SECONDS)


def stop(client: Any, job: str) -> None:
    """Stop a job and wait until it has ended; a further Ctrl-C changes nothing.

    Raises:
        TrainingFailed: it has not ended after `STOP_SECONDS`.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        client.stop_job(job)
        deadline = time.monotonic() + STOP_SECONDS
        while not client.get_job_status(job).is_terminal():
            if time.monotonic() > deadline:
                raise TrainingFailed(f"job {job} has not ended {STOP_SECONDS:.0f} s after its stop")
            time.sleep(POLL_SECONDS)
    finally:
        signal.signal(signal.SIGINT, previous)


def reported_error(log: str, message: str | None) -> str:
    """What a job said of its end: its own last `error:` with what follows, or Ray's message."""
    lines = log.rstrip().splitlines()
    for position in range(len(lines) - 1, -1, -1):
        if lines[position].startswith("error: "):
            return "\n".join(lines[position:]).removeprefix("error: ")
    lines = lines or (message or "").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
