"""Keeps finished runs, and writes the pages that speak of them.

`python -m hpo_verl.report.publish [FOLDER ...]` (`make results`) merges the runs of the folders,
those of `hpo-verl lab run` into `recipes/lab/results/STUDY.parquet` and those of `hpo-verl train`
into `recipes/lab/results/verl/runs.parquet`. From all files there it rewrites the manifest, the
map, and the blocks of README.md that stand between `<!-- results: NAME -->` and `<!-- end -->`.
What is written depends on what is kept alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpo_verl.config.recipes import recipes_directory, study_names
from hpo_verl.errors import ConfigError, DataError, HpoVerlError
from hpo_verl.report.comparison import compare_studies
from hpo_verl.report.dissections import dissections
from hpo_verl.report.effects import NOT_RUN, TERMS, study_text
from hpo_verl.report.evidence import blocks, manifest, study_facts
from hpo_verl.report.figures import draw_study
from hpo_verl.report.rates import chosen_rates
from hpo_verl.report.studies import Result, merged, read_results, write_results
from hpo_verl.report.verl_runs import (
    is_verl_run,
    merged_runs,
    read_verl_run,
    read_verl_runs,
    write_verl_runs,
)
from hpo_verl.runs.files import write_atomically

PAGE = "report.md"
PICTURES = "pictures"
VERL_RUNS = Path("verl") / "runs.parquet"
_PREFACE = f"""# Comparison of algorithms

{TERMS}

Small policies and synthetic tasks: nothing here is a statement about large models."""


def results_directory() -> Path:
    """Where results are kept."""
    return recipes_directory() / "lab" / "results"


def read_sources(sources: Sequence[Path]) -> dict[str, list[Result]]:
    """Read finished runs of folders or parquet files, by study; of one run twice the later one.

    Raises:
        ConfigError: A source holds nothing.
    """
    by_study: dict[str, list[Result]] = {}
    for source in sources:
        results = read_results(source)
        if not results:
            what = "holds no finished run" if source.exists() else "no such folder or file"
            raise ConfigError(f"{source}: {what}; hpo-verl lab run makes them")
        for result in results:
            by_study.setdefault(result.cell["study"], []).append(result)
    return {study: merged([], results) for study, results in by_study.items()}


def write_report(sources: Sequence[Path], out: Path) -> Path:
    """Write a Markdown page and its pictures into a folder, and return the page's path."""
    found = read_sources(sources)
    studies = compare_studies(found, list(found))
    parts = [_PREFACE]
    try:
        for study in studies:
            parts += [f"## {study.study}", study_text(study, planned=False)]
            if study.plan.tuned:
                parts.append(chosen_rates(study))
            if (text := dissections(study)) != NOT_RUN:
                parts.append(text)
            parts += [
                f"![{caption}]({PICTURES}/{path.name})\n\n{caption}"
                for path, caption in draw_study(study, out / PICTURES)
            ]
            made = json.dumps(study_facts(study.results), indent=2)
            parts.append(f"How it was made:\n\n```json\n{made}\n```")
        write_atomically(out / PAGE, "\n\n".join(parts) + "\n")
    except OSError as error:
        raise DataError(f"{out}: cannot write the report: {error}") from error
    return out / PAGE


def publish(folders: Sequence[Path], kept: Path) -> None:
    """Merge the runs of folders into the kept ones; rewrite manifest, map and README.md.

    A run replaces one of the same study, regime, variant and seed.

    Raises:
        ConfigError: A folder holds no run, a kept study has no file in `recipes/lab`, or some runs
            cannot be compared. Nothing has been written then.
    """
    known = study_names()
    of_verl = [folder for folder in folders if is_verl_run(folder)]
    new = read_sources([folder for folder in folders if folder not in of_verl])
    files = {path.stem: path for path in sorted(kept.glob("*.parquet"))}
    for name in [*files, *new]:
        if name not in known:
            where = files.get(name, name)
            raise ConfigError(f"{where}: {name!r} is no study of recipes/lab: {', '.join(known)}")
    old = {name: read_results(path) for name, path in files.items()}
    every = {name: merged(old.get(name, []), new.get(name, [])) for name in known}
    studies = {study.study: study for study in compare_studies(every, known)}
    runs = merged_runs(
        read_verl_runs(kept / VERL_RUNS), [read_verl_run(folder) for folder in of_verl]
    )
    page = kept / "README.md"
    found = blocks(studies, runs, kept)
    text = fill(page.read_text(encoding="utf-8"), found, page)
    for name in new:
        write_results(kept / f"{name}.parquet", studies[name].results)
    if of_verl:
        write_verl_runs(kept / VERL_RUNS, runs)
    facts = manifest(list(studies.values()), runs)
    write_atomically(kept / "manifest.json", json.dumps(facts, indent=2) + "\n")
    write_atomically(page, text)


def fill(text: str, blocks: Mapping[str, str], page: Path) -> str:
    """Replace the content of every block of a text; a block without content is a DataError."""
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


if __name__ == "__main__":
    try:
        publish([Path(name) for name in sys.argv[1:]], results_directory())
    except HpoVerlError as error:
        sys.exit(f"error: {error}")
