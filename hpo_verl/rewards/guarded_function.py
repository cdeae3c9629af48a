"""Calls a reward function in a process of its own, within a time limit per response."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from typing import Any

from hpo_verl.child import module_arguments
from hpo_verl.core.settings import parse_settings, require_number
from hpo_verl.errors import DataError
from hpo_verl.rewards.scoring_process import describe

SECTION = "reward.guard"
VERLS_FUNCTION = ("pkg://verl.utils.reward_score", "default_compute_score")
START_SECONDS = 120.0
# So many responses may run into the time limit whatever the batch's size.
FREE_HANGS = 3

Answer = tuple[dict[str, Any], str]
"""The reward's result and "", or an empty mapping and what was wrong."""


@dataclass(frozen=True)
class RewardGuardSettings:
    """The section `reward.guard`.

    Attributes:
        time_limit: Seconds for one response, in (0, 3600].
        max_error_fraction: Share of a step's responses in [0, 1]; above it the run ends.
    """

    time_limit: float = 10.0
    max_error_fraction: float = 0.1

    def __post_init__(self) -> None:
        require_number(f"{SECTION}.time_limit", self.time_limit, 0, 3600, open_low=True)
        require_number(f"{SECTION}.max_error_fraction", self.max_error_fraction, 0, 1)


def guard_section(section: Mapping[str, Any] | None) -> RewardGuardSettings:
    """Read the section `reward.guard`; a bad one raises a ConfigError."""
    return parse_settings(RewardGuardSettings, section, SECTION)


class GuardedFunction:
    """A reward function behind a process that is ended when a call takes too long.

    Args:
        path: `pkg://package.module`, or a Python file.
        name: Of the function in it.
        guard: Where more than its share of a batch has gone wrong, the rest is given up, so that
            a reward that always hangs costs little more than that share.

    Raises:
        DataError: The function cannot be loaded.
    """

    def __init__(self, path: str, name: str, guard: RewardGuardSettings) -> None:
        self.path, self.name, self.guard = path, name, guard
        if problem := self._start():
            raise DataError(f"{name} of {path} cannot be loaded: {problem}")

    def score(self, calls: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Call the function with each response's keyword arguments, one after the other.

        Returns:
            An answer for each; no exception of the function's gets out.
        """
        answers: list[Answer] = []
        errors = hangs = 0
        while len(answers) < len(calls):
            try:
                self._connection.send([_pickled(call) for call in calls[len(answers) :]])
                while len(answers) < len(calls):
                    if not self._connection.poll(self.guard.time_limit):
                        raise TimeoutError
                    answers.append(pickle.loads(self._connection.recv_bytes()))  # noqa: S301
                    errors += bool(answers[-1][1])
                break
            except TimeoutError:
                hangs += 1
                problem = f"the reward did not return within {self.guard.time_limit:g} s"
            except (EOFError, OSError):
                problem = "the reward ended its process"
            # What was sent after the call that went wrong is sent again.
            answers.append(({}, problem))
            errors += 1
            self.close()
            problem = self._start()
            if hangs >= FREE_HANGS and errors > self.guard.max_error_fraction * len(calls):
                problem = f"not called: {hangs} responses of its batch ran into the time limit"
            if problem:
                answers += [({}, problem)] * (len(calls) - len(answers))
        return answers

    def _start(self) -> str:
        """Start a process; return what keeps the function from being loaded, or ""."""
        self._connection, its = Pipe()
        with its:
            descriptor = str(its.fileno())
            module = "hpo_verl.rewards.scoring_process"
            # Last, so that a reward finds its neighbours and nobody else finds the user's types.py;
            # in its place where PYTHONPATH asks for it.
            here, asked = os.getcwd(), os.environ.get("PYTHONPATH", "").split(os.pathsep)
            wanted = here in map(os.path.abspath, filter(None, asked))
            paths = [path for path in sys.path if path and (path != here or wanted)]
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, *module_arguments(module), descriptor, self.path, self.name],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([*paths, here])},
            )
        try:
            if self._connection.poll(START_SECONDS):
                return self._connection.recv()[1]
            problem = f"not loaded within {START_SECONDS:g} s"
        except (EOFError, OSError):
            problem = "its process ended while loading it"
        self.close()
        return problem

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


def _pickled(call: Mapping[str, Any]) -> bytes | str:
    """A call's arguments, or why they cannot be sent."""
    try:
        return pickle.dumps(dict(call))
    except Exception as error:
        return describe(error)
