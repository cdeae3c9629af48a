"""Run a study: the cells that are missing, a few at a time, with an honest estimate.

A cell is written when it is finished and never computed again, so a study that was killed goes on
where it stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.lab.results import cell_path, read_results, require_same_settings, write_result
from hpo_verl.lab.settings import Cell, Study
from hpo_verl.lab.trainer import run_cell
from hpo_verl.runs.lock import locked


class Finished(NamedTuple):
    """A cell that has just been finished.

    Attributes:
        cell: Which.
        success: On held-out questions, at the end.
        seconds: Wall time, with the warm start where that had to be made.
        status: `finished` or `diverged`.
    """

    cell: Cell
    success: float
    seconds: float
    status: str


def missing_cells(study: Study, folder: Path) -> list[Cell]:
    """Cells of the study that the folder does not hold yet.

    Raises:
        ConfigError: The folder holds runs that trained or were measured differently.
        DataError: A file there is no result.
    """
    cells = study.cells()
    present = [result.cell for result in read_results(folder)]
    shared = {"training": vars(study.training), "evaluation": vars(study.evaluation)}
    require_same_settings(folder, [*present, shared])
    return [cell for cell in cells if not cell_path(folder, cell).exists()]


def run_study(
    study: Study,
    folder: Path,
    workers: int,
    device: str,
    report: Callable[[Finished], None],
    command: str = "",
) -> None:
    """Run the missing cells of a study.

    Args:
        study: What to run.
        folder: Where results are kept.
        workers: Processes, one cell each at a time; 1 stays in this process.
        device: `cpu` or a CUDA device.
        report: Told of every cell as it is finished.
        command: That asked for the study; kept with the results.

    Raises:
        EnvironmentCheckError: Another process runs a study in this folder, or a worker was killed.
    """
    with locked(folder, remedy="choose another with --out"):
        cells = missing_cells(study, folder)
        if workers == 1:
            for cell in cells:
                report(_run_and_write(cell, folder, device, command))
            return
        for finished in _in_parallel(cells, folder, workers, device, command):
            report(finished)


class Estimate:
    """How long a study still takes, from the cells that have been finished in this run.

    Args:
        cells: Those to run.
        workers: How many at a time.
    """

    def __init__(self, cells: list[Cell], workers: int) -> None:
        self._left = [_kind(cell) for cell in cells]
        self._workers = workers
        self._seconds: dict[tuple[str, str], list[float]] = {}

    def update(self, finished: Finished) -> None:
        """Learn from a finished cell."""
        kind = _kind(finished.cell)
        self._left.remove(kind)
        self._seconds.setdefault(kind, []).append(finished.seconds)

    def seconds(self) -> float | None:
        """Seconds left; None before the first cell is finished.

        A cell is expected to take as long as those of its task and algorithm did, or, where
        there is none yet, as long as the slowest kind.
        """
        if not self._seconds:
            return None
        means = {kind: sum(taken) / len(taken) for kind, taken in self._seconds.items()}
        slowest = max(means.values())
        return sum(means.get(kind, slowest) for kind in self._left) / self._workers


def _kind(cell: Cell) -> tuple[str, str]:
    return cell.task, cell.algorithm


def _run_and_write(cell: Cell, folder: Path, device: str, command: str) -> Finished:
    started = time.monotonic()
    outcome = run_cell(cell, device)
    write_result(folder, cell, outcome, command)
    seconds = time.monotonic() - started
    return Finished(cell, outcome.rows[-1]["success"], seconds, outcome.facts["status"])


def _in_parallel(
    cells: list[Cell], folder: Path, workers: int, device: str, command: str
) -> Iterator[Finished]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            futures = [pool.submit(_run_and_write, cell, folder, device, command) for cell in cells]
            for future in as_completed(futures):
                yield future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise EnvironmentCheckError(
                    "a worker process was killed, perhaps for want of memory; the finished runs "
                    "are kept, and the same command goes on from there"
                ) from error
            raise


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it does, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def end_with_parent() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
