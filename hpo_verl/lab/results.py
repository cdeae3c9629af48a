"""Results on disk: one small parquet file per finished cell, there whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.installed import package_versions
from hpo_verl.lab.settings import Cell
from hpo_verl.lab.trainer import Outcome
from hpo_verl.runs.files import write_atomically

_KEY = b"hpo_verl_lab"
_SETTINGS = ("training", "evaluation")
_IDENTITY = ("study", "task", "warm_start", "variant", "algorithm", "learning_rate", "seed")


class Result(NamedTuple):
    """A finished cell.

    Attributes:
        facts: The cell's settings (`cell`), `status`, `seconds`, `warm_start_success`, and
            `environment`: commit, versions, machine, time.
        columns: Values by step: `step`, `success` (NaN where not measured), statistics of
            the batch.
    """

    facts: dict[str, Any]
    columns: dict[str, list[float]]

    @property
    def cell(self) -> dict[str, Any]:
        """Settings of the cell, by the names of `Cell`."""
        return self.facts["cell"]


def environment(command: str) -> dict[str, str]:
    """What else a result may depend on: commit, versions, machine, command, time."""
    return {
        "commit": _commit(),
        "versions": json.dumps(package_versions()),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "command": command,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cell_path(folder: Path, cell: Cell) -> Path:
    """File of a cell's result."""
    return folder / f"{cell.name}.parquet"


def write_result(folder: Path, cell: Cell, outcome: Outcome, command: str = "") -> Path:
    """Write a finished cell; a killed process leaves no part of it.

    Args:
        folder: Made if missing.
        cell: Which.
        outcome: Of `run_cell`.
        command: That asked for it.

    Raises:
        DataError: The file cannot be written.
    """
    names = sorted({name for row in outcome.rows for name in row})
    columns = {name: [row.get(name, math.nan) for row in outcome.rows] for name in names}
    facts = {
        "cell": dataclasses.asdict(cell),
        **outcome.facts,
        "environment": environment(command),
    }
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(facts)})
    path = cell_path(folder, cell)
    try:
        write_table(path, table)
    except OSError as error:
        raise DataError(f"{path}: cannot write: {error}") from error
    return path


def read_results(folder: Path) -> list[Result]:
    """Read the finished cells of a folder, in order of their names.

    Raises:
        DataError: A file is damaged or is no result.
    """
    return [_read(path) for path in sorted(folder.glob("*.parquet"))]


def read_sources(sources: Sequence[Path]) -> dict[str, list[Result]]:
    """Read finished cells, thinned, by the study that they belong to.

    Args:
        sources: Folders of `hpo-verl lab run`, or files that hold a `long_table`.

    Raises:
        ConfigError: A source holds nothing.
        DataError: A file is damaged or is no result.
    """
    by_study: dict[str, list[Result]] = {}
    for source in sources:
        results = read_long_table(source) if source.is_file() else read_results(source)
        if not results:
            raise ConfigError(f"{source}: holds no finished run; hpo-verl lab run makes them")
        for result in results:
            by_study.setdefault(result.cell["study"], []).append(thinned(result))
    return by_study


def manifest(results: Sequence[Result]) -> dict[str, Any]:
    """What some results were made with: runs, seeds, hours, commits, versions, machine, command."""
    environments = {
        json.dumps({k: v for k, v in result.facts["environment"].items() if k != "finished"})
        for result in results
    }
    return {
        "runs": len(results),
        "diverged": sum(result.facts["status"] == "diverged" for result in results),
        "seeds": sorted({result.cell["seed"] for result in results}),
        "hours": round(sum(result.facts["seconds"] for result in results) / 3600, 2),
        "environments": [json.loads(text) for text in sorted(environments)],
    }


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as parquet; there whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue().to_pybytes())


def require_same_settings(folder: Path, settings: Iterable[dict[str, Any]]) -> None:
    """Refuse to compare runs that trained or were measured differently.

    Args:
        folder: For the message.
        settings: Cells' settings; `training` and `evaluation` must be the same in all.

    Raises:
        ConfigError: Names the first setting that differs, and its values.
    """
    first: dict[str, Any] | None = None
    for cell in settings:
        if first is None:
            first = cell
        for section in _SETTINGS:
            for key, value in cell[section].items():
                # The cell's own learning rate counts, not the study's default.
                if key != "learning_rate" and value != first[section][key]:
                    raise ConfigError(
                        f"{folder}: holds runs with {section}.{key} = {first[section][key]} and "
                        f"{value}, which cannot be compared; give one of them a folder of its own "
                        "with --out"
                    )


def thinned(result: Result) -> Result:
    """Keep the steps at which success was measured, and the first one, in single precision.

    What lies between repeats itself; a file that is kept in the repository must be small.
    """
    columns = result.columns
    kept = [
        i
        for i, (step, success) in enumerate(zip(columns["step"], columns["success"], strict=True))
        if step <= 1 or not math.isnan(success)
    ]
    return Result(
        result.facts,
        {
            name: np.asarray(values, np.float32)[kept].astype(float).tolist()
            for name, values in columns.items()
        },
    )


def long_table(results: list[Result]) -> pa.Table:
    """Thinned results as one table: a row per cell and step, with the cell's identity.

    Metadata `hpo_verl_lab` holds the manifest: `shared`, facts that many cells have in
    common, and `cells`, the facts of each with places in `shared`.
    """
    names = sorted({name for result in results for name in result.columns})
    columns: dict[str, list[Any]] = {name: [] for name in (*_IDENTITY, "status", *names)}
    shared: list[dict[str, Any]] = []
    cells = []

    def place(facts: dict[str, Any]) -> int:
        if facts not in shared:
            shared.append(facts)
        return shared.index(facts)

    for result in results:
        rows = len(result.columns["step"])
        for key in _IDENTITY:
            columns[key] += [result.cell[key]] * rows
        columns["status"] += [result.facts["status"]] * rows
        for name in names:
            columns[name] += result.columns.get(name, [math.nan] * rows)
        cell = {k: place(v) if k in _SETTINGS else v for k, v in result.cell.items()}
        environment = dict(result.facts["environment"])
        finished = environment.pop("finished", "")
        common = {"cell": cell, "environment": place(environment), "finished": finished}
        cells.append({**result.facts, **common, "rows": rows})
    manifest = json.dumps({"shared": shared, "cells": cells})
    table = pa.table(columns)
    for i, name in enumerate(table.column_names):
        if name in names:
            table = table.set_column(i, name, table[name].cast(pa.float32()))
    return table.replace_schema_metadata({_KEY: manifest})


def read_long_table(path: Path) -> list[Result]:
    """Read what `long_table` made, cell by cell.

    Raises:
        DataError: The file is damaged or is no result.
    """
    table, manifest = _read_table(path)
    columns: dict[str, list[Any]] = table.to_pydict()
    statistics = [name for name in columns if name not in (*_IDENTITY, "status")]
    results, start = [], 0
    for facts in manifest["cells"]:
        end = start + facts.pop("rows")
        places = facts.pop("finished"), manifest["shared"][facts["environment"]]
        facts["environment"] = {**places[1], "finished": places[0]}
        for key in _SETTINGS:
            facts["cell"][key] = manifest["shared"][facts["cell"][key]]
        results.append(Result(facts, {name: columns[name][start:end] for name in statistics}))
        start = end
    return results


def _read(path: Path) -> Result:
    table, facts = _read_table(path)
    return Result(facts, table.to_pydict())


def _read_table(path: Path) -> tuple[pa.Table, Any]:
    try:
        table = pq.read_table(path)
        return table, json.loads((table.schema.metadata or {})[_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(f"{path}: is no result of hpo-verl lab; remove it") from error


def _commit() -> str:
    """Commit of the code, with `+` if files differ from it; `unknown` outside a repository."""
    try:
        folder = Path(__file__).parent
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],  # noqa: S607
            cwd=folder, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
