"""Ends a process that imports a module named in FORBID; Python imports this from PYTHONPATH."""

import importlib.abc
import os
import sys

FORBIDDEN = os.environ.get("FORBID", "").split()


class Guard(importlib.abc.MetaPathFinder):
    """Looks at every import first."""

    def find_spec(self, name, path=None, target=None):
        if name in FORBIDDEN:
            sys.stderr.write(f"imported {name}\n")
            sys.stderr.flush()
            # No handler of an optional import may pass over it.
            os._exit(99)


sys.meta_path.insert(0, Guard())
