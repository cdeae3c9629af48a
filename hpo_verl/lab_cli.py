"""`hpo-verl lab`: compare algorithms over many seeds, without a cluster."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from hpo_verl.errors import ConfigError

RUNS = Path("runs") / "lab"

app = typer.Typer(
    no_args_is_help=True, help="Compare algorithms over many seeds, without a cluster."
)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    study: Annotated[str, typer.Argument(help="sparse, alpha, length, telelogs or lr.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings; see recipes/lab/base.yaml."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A variant to run, again for each; all of them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; runs/lab/STUDY.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; one per core, one on a GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Run a study; what is finished is kept, and the same command goes on where it stopped.

    Examples:
      hpo-verl lab run sparse

      hpo-verl lab run sparse 'warm_starts=[0.05]' seeds=4

      hpo-verl lab run alpha training.steps=40 --out runs/lab/alpha-short

      hpo-verl lab run sparse --only grpo --only a_hpo
    """
    from hpo_verl.lab.settings import read_study, with_variants
    from hpo_verl.lab.study import Estimate, Finished, missing_cells, run_study

    _check_device(device)
    chosen = with_variants(read_study(study, overrides or []), only or [])
    folder = (out or RUNS / study).absolute()
    count = workers or (1 if device != "cpu" else os.cpu_count() or 1)
    cells = missing_cells(chosen, folder)
    console = Console(highlight=False, soft_wrap=True)
    total = len(chosen.cells())
    console.print(f"{study}: {total} runs, {total - len(cells)} of them finished; {folder}")
    estimate = Estimate(cells, count)
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"), console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(
            study, total=total, completed=total - len(cells), left="no estimate yet"
        )

        def report(finished: Finished) -> None:
            estimate.update(finished)
            left = _duration(estimate.seconds())
            bar.update(task, advance=1, left=left)
            done = int(bar.tasks[0].completed)
            console.print(
                f"{done}/{total}  {finished.cell.name.rpartition('-')[0]}  {finished.status}  "
                f"success {finished.success:.1%}  {finished.seconds:.0f} s  {left}"
            )

        chosen_by = [word for name in only or [] for word in ("--only", name)]
        command = shlex.join(["hpo-verl", "lab", "run", study, *(overrides or []), *chosen_by])
        run_study(chosen, folder, count, device, report, command)
    console.print(f"finished; a report: hpo-verl lab report {folder}")


@app.command()
def report(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of `lab run`, or results.parquet files; all of runs/lab."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = RUNS / "report",
) -> None:
    """Compute intervals, draw, and write one HTML page, the pictures and results.parquet.

    Examples:
      hpo-verl lab report

      hpo-verl lab report runs/lab/sparse --out report
    """
    from hpo_verl.lab.page import write_report

    found = sources or sorted({path.parent for path in RUNS.glob("*/*-seed*.parquet")})
    if not found:
        raise ConfigError(f"{RUNS}: holds no finished run; hpo-verl lab run STUDY makes them")
    for source in found:
        if not source.exists():
            raise ConfigError(f"{source}: no such folder or file")
    print(write_report(found, out, print))


def _check_device(device: str) -> None:
    import torch

    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ConfigError(f"--device {device}: must be cpu, or cuda where there is such a device")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "no estimate yet"
    minutes = round(seconds / 60)
    return f"about {minutes // 60} h {minutes % 60:02d} min left"
