"""Keep results in the repository, and write the tables that speak of them.

`python -m hpo_verl.lab.publish [FOLDER ...]` (`make results`) puts the runs of the folders into
`recipes/lab/results/STUDY.parquet`, and from all files there rewrites the manifest, the pictures,
and the blocks of its README.md that stand between `<!-- results: NAME -->` and
`<!-- end -->`. What is written depends on the parquet files alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpo_verl.config.recipes import recipes_directory
from hpo_verl.errors import DataError
from hpo_verl.lab.comparison import BASELINE, Comparison, Regime, Row
from hpo_verl.lab.pictures import draw_all
from hpo_verl.lab.results import (
    Result,
    long_table,
    manifest,
    read_sources,
    require_same_settings,
    write_table,
)
from hpo_verl.lab.settings import variant_order
from hpo_verl.lab.statistics import shown
from hpo_verl.runs.files import write_atomically

MANIFEST = "manifest.json"
_KINDS = ("-curves", "-intervals", "-alpha", "-ablation")


def results_directory() -> Path:
    """Where results are kept."""
    return recipes_directory() / "lab" / "results"


def keep(folders: Sequence[Path], kept: Path) -> None:
    """Put finished runs into one file per study; an earlier file of a study is replaced.

    Args:
        folders: Of `hpo-verl lab run`; may be empty.
        kept: Where the files of studies are.

    Raises:
        ConfigError: A folder holds nothing, or runs that cannot be compared.
        DataError: A file is damaged.
    """
    for study, results in read_sources(folders).items():
        require_same_settings(kept / study, [result.cell for result in results])
        write_table(kept / f"{study}.parquet", long_table(results))


def write_pages(kept: Path, pages: Sequence[Path]) -> None:
    """Write the manifest, and fill the blocks of the pages, from the kept files.

    Args:
        kept: Where the files of studies are.
        pages: Texts with blocks to fill.

    Raises:
        DataError: A file is damaged, or a page asks for what there is not.
    """
    studies = read_sources(sorted(kept.glob("*.parquet")))
    text = json.dumps({name: manifest(results) for name, results in studies.items()}, indent=2)
    write_atomically(kept / MANIFEST, text + "\n")
    blocks: dict[str, str] = {}
    for name, results in studies.items():
        blocks |= tables(Comparison(name, results, variant_order(name)), results)
    for page in pages:
        write_atomically(page, fill(page.read_text(encoding="utf-8"), blocks, page))


def draw_kept(kept: Path) -> None:
    """Draw the pictures of the kept files, in place of those that are there.

    Args:
        kept: Where the files of studies are.
    """
    folder = kept / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.svg"):
        path.unlink()
    with tempfile.TemporaryDirectory() as everything:
        for name, results in read_sources(sorted(kept.glob("*.parquet"))).items():
            comparison = Comparison(name, results, variant_order(name))
            for picture in draw_all(comparison, Path(everything)):
                if picture.name.endswith(_KINDS):
                    for path in picture.svg.values():
                        shutil.copyfile(path, folder / path.name)


def tables(comparison: Comparison, results: Sequence[Result]) -> dict[str, str]:
    """Markdown by block: `STUDY` for every regime with a heading, `STUDY/REGIME` for one alone.

    Args:
        comparison: The study.
        results: Its runs.
    """
    blocks = {
        f"{comparison.study}/{regime.task}-{regime.warm_start:g}": _table(comparison.rows([regime]))
        for regime in comparison.regimes
    }
    sections = [_setting(results), *(_section(comparison, regime) for regime in comparison.regimes)]
    return {**blocks, comparison.study: "\n\n".join(sections)}


def fill(text: str, blocks: Mapping[str, str], page: Path) -> str:
    """Replace the content of every block of a text.

    Raises:
        DataError: A block is not closed, or there is nothing for it.
    """
    begin, end = "<!-- results: ", "<!-- end -->"
    head, *parts = text.split(begin)
    filled = [head]
    for part in parts:
        name, closed, rest = part.partition(" -->")
        _, ended, after = rest.partition(end)
        if not (closed and ended):
            raise DataError(f"{page}: the block {begin}{name} is not closed by {end}")
        if name not in blocks:
            raise DataError(f"{page}: no results for the block {name!r}: {', '.join(blocks)}")
        filled.append(f"{begin}{name} -->\n{blocks[name]}\n{end}{after}")
    return "".join(filled)


def _setting(results: Sequence[Result]) -> str:
    cell = results[0].cell
    training, evaluation = cell["training"], cell["evaluation"]
    rates = sorted({result.cell["learning_rate"] for result in results})
    seeds = {result.cell["seed"] for result in results}
    return (
        f"{len(results)} runs, {len(seeds)} seeds, {training['steps']} steps of "
        f"{training['prompts_per_step']} x {training['responses_per_prompt']} responses in "
        f"{training['mini_batches']} mini-batches, AdamW at {', '.join(f'{r:g}' for r in rates)}; "
        f"success on {evaluation['questions']} held-out questions every "
        f"{evaluation['every']} steps."
    )


def _section(comparison: Comparison, regime: Regime) -> str:
    start = comparison.beginning(regime)
    return f"### {regime.title}\n\n{start}\n\n{_table(comparison.rows([regime]))}"


def _table(rows: Sequence[Row]) -> str:
    header = ["method", "lr", "runs", "collapsed", "after 10 %", "after 25 %", "final", "area",
              f"area - {BASELINE}", "P(better area)"]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    for row in rows:
        lines.append([
            f"`{row.variant}`", f"{row.learning_rate:g}", str(row.runs), str(row.collapses),
            *(shown(row.measures[name], 3) for name in ("at_10", "at_25", "final", "area")),
            shown(row.differences.get("area"), 3), shown(row.improvement.get("area"), 2),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    results_of = results_directory()
    keep([Path(name) for name in sys.argv[1:]], results_of)
    write_pages(results_of, [results_of / "README.md"])
    draw_kept(results_of)
