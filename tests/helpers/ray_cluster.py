"""A Ray head and a second node, as processes of this machine, on loopback, with a token.

Like the machines of a cluster they have everything but this package, which a job brings along.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
from bare_environment import make_bare_environment

MARKER = "HPO_VERL_TEST_CLUSTER"
# Ray's own processes on a node without work; IDLE ones wait for some.
RESTING = {"ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class RayCluster:
    """The head has no GPU, the second node a nominal one, so that the ranks run there.

    Args:
        cache: Where data and policies are.
        imported: A module that every process of the cluster imports at its start.
    """

    def __init__(self, cache, imported=None):
        # Short, since Ray puts sockets below it.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.mark = secrets.token_hex(8)
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        gcs, dashboard, client, *agents = free_ports(5)
        self.url = f"http://127.0.0.1:{dashboard}"
        (self.folder / "tmp").mkdir()
        self.python = make_bare_environment(self.folder / "python", imported)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            **self.token,
            MARKER: self.mark,
            "HPO_VERL_CACHE": str(cache),
            "TMPDIR": str(self.folder / "tmp"),
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        common = ["--block", "--node-ip-address=127.0.0.1", "--num-cpus=8"]
        common += ["--object-store-memory=200000000"]
        self.nodes = []
        self._start(
            [self.python, "-m", "ray.scripts.scripts", "start", "--head", f"--port={gcs}"],
            [f"--temp-dir={self.folder / 'r'}"],
            ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-gpus=0"],
            [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agents[0]}"],
            common,
        )
        self._start(
            [self.python, Path(__file__).with_name("loopback_node.py"), "start"],
            [f"--address=127.0.0.1:{gcs}", "--num-gpus=1"],
            [f"--dashboard-agent-listen-port={agents[1]}"],
            common,
        )

    def _start(self, *parts):
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("w") as stream:
            node = subprocess.Popen(
                [argument for part in parts for argument in part],
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )
        self.nodes.append(node)
        deadline = time.monotonic() + 120
        while "will now block forever" not in log.read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                text = log.read_text()
                self.stop()
                raise RuntimeError(text)
            time.sleep(0.2)

    def processes(self):
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(MARKER) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def busy(self):
        """Names of the processes that work on a job."""
        names = set()
        for process in self.processes():
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if "hpo_verl" in command or "verl.trainer" in command or "ray::" in command:
                names.add(command)
        return {name for name in names if not name.startswith(tuple(RESTING))}

    def stop(self):
        """End both nodes, and return what of them still runs a while later."""
        for node in reversed(self.nodes):
            node.terminate()
        for node in reversed(self.nodes):
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                node.kill()
        self.nodes = []
        _, left = psutil.wait_procs(self.processes(), timeout=20)
        names = [process.name() for process in left]
        for process in left:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        return names
