"""What every test starts with, wherever pytest was started, and what runs side by side."""

import os
import signal

from xdist.scheduler import LoadScopeScheduling

# A shell starts jobs in the background with SIGINT ignored, and so would our children be.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The width that pytest-xdist or a shell exports would break the lines of commands.
os.environ.pop("COLUMNS", None)

# Whole runs take most of the memory, so no two of these files run at the same time.
WITH_RAY = (
    "tests/e2e/",
    "tests/checks/test_cluster.py",
    "tests/contract/test_worker_threads.py",
    "tests/verl_plugin/test_main.py",
)


class ByFile(LoadScopeScheduling):
    """Gives a process a whole file, and one process all files that start Ray."""

    def _split_scope(self, nodeid):
        return "ray" if nodeid.startswith(WITH_RAY) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """Begin with what takes longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(WITH_RAY))
