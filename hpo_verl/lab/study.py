"""Run a study: the cells that are missing, a few at a time.

A cell is written when it is finished and never computed again, so a study that was killed goes on
where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pandas as pd

from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.installed import package_versions
from hpo_verl.lab.settings import Cell, Study
from hpo_verl.lab.trainer import Outcome, run_cell
from hpo_verl.report.studies import (
    Result,
    area_of,
    read_results,
    require_same_settings,
    write_results,
)
from hpo_verl.runs.files import locked


def missing_cells(study: Study, folder: Path) -> list[Cell]:
    """Cells that the folder does not hold yet and that can be run now.

    The runs that tuning decides on come when those that tune are there.

    Raises:
        ConfigError: The folder holds runs that were measured in another way.
    """
    shared = {"evaluation": vars(study.evaluation)}
    require_same_settings(folder, [*(result.cell for result in read_results(folder)), shared])
    cells = study.cells()
    missing = [cell for cell in cells if not cell_path(folder, cell).exists()]
    if missing or not study.tuning_seeds:
        return missing
    areas = {cell.name: area_of(read_results(cell_path(folder, cell))[0]) for cell in cells}
    chosen = study.compared(areas)
    return [cell for cell in chosen if not cell_path(folder, cell).exists()]


def count_missing(study: Study, folder: Path) -> int:
    """Number of runs that the folder does not hold yet, those that wait for tuning included."""
    missing, first = missing_cells(study, folder), study.cells()
    waiting = study.size - len(first) if any(cell in first for cell in missing) else 0
    return len(missing) + waiting


def cell_path(folder: Path, cell: Cell) -> Path:
    """File of a cell's result."""
    return folder / f"{cell.name}.parquet"


def run_study(
    study: Study,
    folder: Path,
    workers: int,
    report: Callable[[Cell, Outcome], None],
    command: str = "",
) -> None:
    """Run the missing cells of a study, and report each as it is finished.

    One worker is this process, several are processes. The command is kept with the results.

    Raises:
        EnvironmentCheckError: Another process runs a study in this folder, or a worker was killed.
    """
    with locked(folder, remedy="choose another with --out"):
        while cells := missing_cells(study, folder):
            # Either all of them tune or none.
            run = partial(
                _run_and_write, folder=folder, command=command, tuning=study.tunes(cells[0])
            )
            _run_cells(run, cells, workers, report)


def _run_cells(
    run: Callable[[Cell], Outcome],
    cells: Sequence[Cell],
    workers: int,
    report: Callable[[Cell, Outcome], None],
) -> None:
    if workers == 1:
        for cell in cells:
            report(cell, run(cell))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            asked = {pool.submit(run, cell): cell for cell in cells}
            for future in as_completed(asked):
                report(asked[future], future.result())
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise EnvironmentCheckError(
                    "a worker process was killed, perhaps for want of memory; the finished "
                    "runs are kept, and the same command goes on from there"
                ) from error
            raise


def _run_and_write(cell: Cell, folder: Path, command: str, tuning: bool) -> Outcome:
    outcome = run_cell(cell)
    environment = {
        "commit": _commit(),
        "versions": json.dumps(package_versions()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "command": command,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    facts = {
        "cell": dataclasses.asdict(cell),
        "tuning": tuning,
        **outcome.facts,
        "environment": environment,
    }
    write_results(cell_path(folder, cell), [Result(facts, pd.DataFrame(outcome.rows))])
    return outcome


def _commit() -> str:
    """Commit of the code, with `+` if files differ from it; `unknown` outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],  # noqa: S607
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


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
