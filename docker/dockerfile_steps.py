"""Reads a Dockerfile into its instructions, without a Docker engine.

    python docker/dockerfile_steps.py docker/Dockerfile.cpu

prints the commands of its RUN instructions that call pip, one a line: what
`check_install.sh` executes.
"""

from __future__ import annotations

import sys
from pathlib import Path


def instructions(path: Path) -> list[tuple[str, str]]:
    """Keyword in capitals and arguments of each instruction, continuation lines joined."""
    found, pending = [], ""
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("#") or not line.strip():
            continue
        pending += line.strip().removesuffix("\\").strip() + " "
        if not line.rstrip().endswith("\\"):
            keyword, _, arguments = pending.strip().partition(" ")
            found.append((keyword.upper(), arguments.strip()))
            pending = ""
    return found


def install_steps(path: Path) -> list[str]:
    """The shell commands that install, in order."""
    return [text for word, text in instructions(path) if word == "RUN" and "-m pip" in text]


if __name__ == "__main__":
    print("\n".join(install_steps(Path(sys.argv[1]))))
