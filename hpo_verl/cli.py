"""The command `hpo-verl`."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from hpo_verl import __version__
from hpo_verl.config.environment import complete_environment
from hpo_verl.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    HpoVerlError,
    TrainingStopped,
    printable,
)
from hpo_verl.lab_cli import app as lab

app = typer.Typer(
    name="hpo-verl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train language models with hysteretic policy optimisation in verl.\n\n"
        "Exit codes: 0 success, 1 the training failed, 2 wrong input or an error that the doctor "
        "found (nothing was started), 130 interrupted."
    ),
)
app.add_typer(lab, name="lab")


class WithOverrides(TyperCommand):
    """A command whose overrides are checked by it, and not by click."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse letters behind one dash: of `-halgo=x`, click would take `-h` and show help."""
        if glued := [text for text in args if re.match("-[^-].", text)]:
            from hpo_verl.config.overrides import hydra_overrides

            hydra_overrides(glued, {})
        return super().parse_args(ctx, args)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"hpo-verl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of the command itself."""


def _columns() -> int:
    """Width of the terminal; 0 where none shows the output, whose lines then stay whole."""
    return shutil.get_terminal_size((0, 0)).columns


def _fitted(text: str) -> str:
    """A text whose long lines are folded between words, and go on indented."""
    columns, lines = _columns(), []
    for line in text.splitlines():
        if columns and len(line) > columns:
            words = line.lstrip()
            margin = " " * min(len(line) - len(words), columns // 4)
            line = textwrap.fill(
                words, columns, initial_indent=margin, subsequent_indent=f"{margin}    ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
        lines.append(line)
    return "\n".join(lines)


_RECIPE = typer.Argument(help="A recipe of `hpo-verl list`, or a file of yours, ./NAME.yaml.")
Recipe = Annotated[str, _RECIPE]
OptionalRecipe = Annotated[str | None, _RECIPE]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Hydra overrides, as verl takes them."),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the newest whole checkpoint of the run in hydra.run.dir, or of the "
        "recipe's last run here.",
    ),
]


@app.command(cls=WithOverrides, context_settings={"ignore_unknown_options": True})
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = False,
    show_samples: Annotated[
        bool,
        typer.Option(
            "--show-samples",
            help="Show some responses of each validation with their rewards; the run's folder has "
            "them in samples/ anyway.",
        ),
    ] = False,
) -> None:
    """Train a policy as a recipe says; make its data and tiny policy if they are missing.

    Examples:
      hpo-verl train countdown-tiny

      hpo-verl train countdown-tiny algo=hpo algorithm.hpo.alpha=0.4 hydra.run.dir=runs/mine

      hpo-verl train countdown-tiny trainer.total_training_steps=300 --resume

      hpo-verl train ./my-recipe.yaml --show-samples
    """
    from hpo_verl.launch.outputs import shown_results
    from hpo_verl.launch.progress import TrainingProgress
    from hpo_verl.launch.train import train as run

    # Settings hold brackets, which are no markup.
    console = Console(highlight=False, soft_wrap=True, markup=False)
    arguments = overrides or []
    progress = TrainingProgress(console, show_samples)
    with progress:
        folder = run(recipe, arguments, console.print, progress.show, resume)
    for line in shown_results(folder, recipe, arguments):
        console.print(line)


@app.command(cls=WithOverrides, context_settings={"ignore_unknown_options": True})
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    address: Annotated[
        str,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's dashboard."),
    ] = "http://127.0.0.1:8265",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job to its end; Ctrl-C stops it.")
    ] = True,
    resume: Resume = False,
) -> None:
    """Train a policy as a job on a Ray cluster.

    Examples:
      hpo-verl submit countdown3-1.5b hydra.run.dir=/shared/runs/first

      hpo-verl submit countdown3-7b --address http://127.0.0.1:8265 --no-wait hardware=2x8gpu
    """
    from hpo_verl.launch.submit import submit as run

    announce, write = partial(print, flush=True), partial(print, end="", flush=True)
    run(recipe, overrides or [], address, wait, announce, write, resume)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty folder.")],
) -> None:
    """Write a small task of your own, to be changed: a recipe, a reward, ten rows and a script.

    It runs at once on a CPU.

    Examples:
      hpo-verl init my-task

      hpo-verl train my-task/recipe.yaml
    """
    from hpo_verl.launch.new_task import make_task

    files = make_task(folder)
    print(*files, f"next: hpo-verl train {shlex.quote(str(files[0]))}", sep="\n")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    picture: Annotated[Path, typer.Option(help="Picture to write: .png, .svg or .pdf.")] = Path(
        "report.png"
    ),
) -> None:
    """Compare finished runs: a table, interquartile means over seeds, and a picture.

    The dashed curve in the picture is that of the first group of runs.

    Examples:
      hpo-verl report runs/a runs/b --picture comparison.svg
    """
    from hpo_verl.report.figures import check_picture, draw_curves
    from hpo_verl.report.runs import curves_of, group_runs, read_runs, runs_table

    check_picture(picture)
    groups = group_runs(read_runs(runs))
    print(_fitted(runs_table(groups, _columns())))
    if curves := curves_of(groups):
        draw_curves(curves, next(iter(curves)), picture)
    print(f"picture: {printable(picture)}" if curves else "no picture: no run was validated")


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run or of one of its checkpoints.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
) -> None:
    """Write a checkpoint's policy as a Hugging Face folder, in bfloat16.

    Examples:
      hpo-verl export runs/countdown3-1.5b/2026-01-31_12-00-00 --out policy
    """
    from hpo_verl.launch.outputs import export as run

    print(f"{run(source, out)} -> {out}")


@app.command()
def replay(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="not_finite_*.pt of a run's folder.")
    ],
) -> None:
    """Evaluate the loss and gradient of a mini-batch again whose update was not finite.

    Examples:
      hpo-verl replay runs/countdown-tiny/2026-01-31_12-00-00/not_finite_0001_rank0.pt
    """
    from hpo_verl.runs.quiet import quiet_imports

    with quiet_imports():
        from hpo_verl.verl_plugin.engine.replay import report
    print(*report(file), sep="\n")


@app.command("list")
def list_() -> None:
    """List the recipes, the algorithms with paper and equation, and what the groups offer.

    Examples:
      hpo-verl list
    """
    from hpo_verl.algorithms.registry import ALGORITHMS
    from hpo_verl.config.recipes import GROUPS, group_options, recipe_names

    lines = [f"recipes: {', '.join(recipe_names())}", "algorithms:"]
    width = max(map(len, ALGORITHMS))
    for algorithm in ALGORITHMS.values():
        papers = " ".join(f"arXiv:{paper}" for paper in algorithm.papers)
        lines.append(f"  {algorithm.name:<{width}}  {papers}  {algorithm.equation}")
    lines += [f"{group}=: {', '.join(group_options(group))}" for group in GROUPS]
    print(_fitted("\n".join(lines)))


@app.command()
def prepare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Make or fetch the data and the policy that a recipe needs, where they are missing.

    What is there is checked and left as it is. Nothing is trained.

    Examples:
      hpo-verl prepare countdown4-7b seed=1

      hpo-verl prepare telelogs-7b prepare.data.arguments.source=hub
    """
    from hpo_verl.checks.list import prepare_recipe

    for made in prepare_recipe(recipe, overrides or [], print):
        print(f"{made.name}: {made.output}")


@app.command()
def doctor(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Without a recipe: versions and the plugin only.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster of which this machine is a node: auto, or HOST:PORT of its head. "
            "Without it a Ray is started on loopback for the check."
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of lines.")
    ] = False,
) -> None:
    """Find what would go wrong with a run before it is started. Trains nothing, writes nothing.

    Exit code 2 if any finding is an error, 0 otherwise.

    Examples:
      hpo-verl doctor countdown-tiny

      hpo-verl doctor countdown4-7b algo=gspo hardware=2x8gpu --address auto

      hpo-verl doctor countdown3-1.5b hardware=1gpu --json

      hpo-verl doctor --quick
    """
    from hpo_verl.config.recipes import recipe_names
    from hpo_verl.errors import ConfigError
    from hpo_verl.launch.doctor import as_json, as_text, examine, examine_installation, has_error
    from hpo_verl.runs.quiet import stdout_reserved

    arguments = overrides or []
    if quick and (recipe or address):
        raise ConfigError(f"--quick with {recipe or address}: it takes no recipe and no address")
    if not quick and recipe is None:
        raise ConfigError(f"a recipe is missing; one of {', '.join(recipe_names())}, or --quick")
    # Libraries print what they like; stdout is for the findings.
    with stdout_reserved():
        findings = examine(recipe, arguments, address) if recipe else examine_installation()
    print(as_json(recipe, arguments, address, findings) if json else _fitted(as_text(findings)))
    if has_error(findings):
        raise typer.Exit(EXIT_BAD_INPUT)


def main() -> None:
    """Entry point: one line and a documented exit code for every error made on purpose."""
    # `kill`, and Ray when it stops a job, must leave as little behind as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        complete_environment()
        app()
    except HpoVerlError as error:
        prefix = "" if isinstance(error, TrainingStopped) else "error: "
        print(f"{prefix}{printable(error)}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except SystemExit as end:
        # Typer turns Ctrl-C into this code, and says nothing.
        if end.code == EXIT_INTERRUPTED:
            print("error: interrupted", file=sys.stderr)
        raise
