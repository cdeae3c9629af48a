"""`hpo-verl lab`: compare algorithms over many seeds, without a cluster."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from hpo_verl.errors import ConfigError

RUNS = Path("runs") / "lab"

app = typer.Typer(
    no_args_is_help=True, help="Compare algorithms over many seeds, without a cluster."
)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    study: Annotated[str, typer.Argument(help="Name of a study; see `hpo-verl lab list`.")],
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
        int | None, typer.Option(min=1, help="Runs at a time; one per core.")
    ] = None,
) -> None:
    """Run a study; what is finished is kept, and the same command goes on where it stopped.

    Examples:
      hpo-verl lab run sparsity warm_start=0.01 wrong_length=4 --only grpo --only a_hpo

      hpo-verl lab run length training.steps=40 --out runs/lab/length-short
    """
    from hpo_verl.config.recipes import require_study
    from hpo_verl.runs.quiet import quiet_imports

    # The imports below take seconds.
    require_study(study)
    with quiet_imports():
        from hpo_verl.lab.settings import Cell, read_study
        from hpo_verl.lab.study import count_missing, run_study
        from hpo_verl.lab.trainer import Outcome

    chosen = read_study(study, overrides or [], only or [])
    folder = (out or RUNS / study).absolute()
    left, total = count_missing(chosen, folder), chosen.size
    print(f"{study}: {total} runs, {total - left} of them finished; {folder}")
    started, done = time.monotonic(), 0

    def report(cell: Cell, outcome: Outcome) -> None:
        nonlocal done
        done += 1
        minutes = round((time.monotonic() - started) / done * (left - done) / 60)
        status, seconds = outcome.facts["status"], outcome.facts["seconds"]
        print(
            f"{total - left + done}/{total}  {cell.name.rpartition('-')[0]}  "
            f"{status}  success {outcome.rows[-1]['success']:.1%}  {seconds:.0f} s  "
            f"about {minutes // 60} h {minutes % 60:02d} min left",
            flush=True,
        )

    chosen_by = [word for name in only or [] for word in ("--only", name)]
    command = shlex.join(["hpo-verl", "lab", "run", study, *(overrides or []), *chosen_by])
    run_study(chosen, folder, workers or os.cpu_count() or 1, report, command)
    print(f"finished; a report: {shlex.join(['hpo-verl', 'lab', 'report', str(folder)])}")


@app.command("list")
def list_() -> None:
    """List the studies.

    Examples:
      hpo-verl lab list
    """
    from hpo_verl.config.recipes import study_names

    print(*study_names(), sep="\n")


@app.command()
def report(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of `lab run`, or parquet files; all of runs/lab."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = RUNS / "report",
) -> None:
    """Compute intervals, draw, and write report.md and its pictures.

    Examples:
      hpo-verl lab report runs/lab/length --out report
    """
    from hpo_verl.report.publish import write_report

    found = sources or sorted({path.parent for path in RUNS.glob("*/*-seed*.parquet")})
    if not found:
        raise ConfigError(f"{RUNS}: holds no finished run; hpo-verl lab run STUDY makes them")
    print(write_report(found, out))
