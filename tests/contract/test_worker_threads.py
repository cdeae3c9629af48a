"""A 7B policy on one card is updated by the CPUs: with as many threads as the recipe says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from composed_recipes import composed

from hpo_verl.config import cluster

CPUS = len(os.sched_getaffinity(0))
PLAIN = "import torch; print(torch.get_num_threads())"
WORKER = Path(__file__).with_name("worker_threads.py")


@pytest.fixture
def variables(monkeypatch):
    """A function: hardware -> what the recipe of the 7B policy gives Ray on this machine."""
    for name in (*cluster.FORWARDED, *cluster._network_variables()):
        monkeypatch.delenv(name, raising=False)

    def of(hardware):
        config = composed("countdown3-7b", (), hardware).copy()
        cluster.forward_environment(config)
        return dict(config.ray_kwargs.ray_init.runtime_env.env_vars)

    return of


def threads(variables):
    """Of a worker of verl, in a Ray of its own on loopback."""
    environment = {name: value for name, value in os.environ.items() if name != cluster.THREADS}
    environment |= {
        "VERL_PLATFORM": "cpu",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(variables)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("threads:")]
    return int(line.split()[1])


def test_the_recipe_gives_the_update_all_cpus(variables):
    given = variables("1gpu")
    assert given[cluster.THREADS] == str(CPUS)
    # torch takes no more than the machine has cores, whatever the variable says.
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN],
        env={**os.environ, cluster.THREADS: str(CPUS)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert threads(given) == int(plain.stdout)


@pytest.mark.slow
def test_elsewhere_a_worker_has_rays_one_thread(variables):
    given = variables("8gpu")
    assert cluster.THREADS not in given
    assert threads(given) == 1


def test_a_number_in_the_configuration_stays(monkeypatch):
    config = composed("countdown3-7b", (), "1gpu").copy()
    config.ray_kwargs.ray_init.runtime_env.env_vars[cluster.THREADS] = "5"
    cluster.forward_environment(config)
    assert config.ray_kwargs.ray_init.runtime_env.env_vars[cluster.THREADS] == "5"
