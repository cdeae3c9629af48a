"""Pages with the tables and figures of studies.

`python -m hpo_verl.report.publish [FOLDER ...]` (`make results`) puts the runs of the folders into
`recipes/lab/results/STUDY.parquet`, and from all files there rewrites the manifest, the pictures,
and the blocks of README.md that stand between `<!-- results: NAME -->` and `<!-- end -->`. What is
written depends on the parquet files alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo_verl.config.recipes import recipes_directory
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.figures import draw_study
from hpo_verl.report.statistics import (
    COLLAPSE_FRACTION,
    FINAL_SHARE,
    RESAMPLES,
    Interval,
)
from hpo_verl.report.studies import Comparison, Result, read_results, write_results
from hpo_verl.runs.files import write_atomically

PAGE = "report.md"
PICTURES = "pictures"
_PREFACE = f"""# Comparison of algorithms

Interquartile means over seeds with 95 % percentile bootstrap intervals ({RESAMPLES} resamples),
paired differences from the baseline by seed, and probability of improvement (arXiv 2108.13264),
computed with scipy. Final: mean over the last {FINAL_SHARE:.0%} of the budget.
Area: under the success curve, divided by the budget. Collapsed: final success below
{COLLAPSE_FRACTION:.0%} of the first one, or diverged; such runs are in every number. Responses:
sampled per step. Small policies and synthetic tasks: nothing here is a statement about large
models."""


def results_directory() -> Path:
    """Where results are kept."""
    return recipes_directory() / "lab" / "results"


def comparisons(sources: Sequence[Path]) -> list[Comparison]:
    """Read finished runs of folders or parquet files, and sort them by study.

    Raises:
        ConfigError: A source holds nothing, or runs that cannot be compared.
    """
    by_study: dict[str, list[Result]] = {}
    for source in sources:
        results = read_results(source)
        if not results:
            what = "holds no finished run" if source.exists() else "no such folder or file"
            raise ConfigError(f"{source}: {what}; hpo-verl lab run makes them")
        for result in results:
            by_study.setdefault(result.cell["study"], []).append(result)
    return [Comparison(study, results) for study, results in by_study.items()]


def write_report(sources: Sequence[Path], out: Path) -> Path:
    """Write a Markdown page and its pictures into a folder, and return the page's path."""
    studies = comparisons(sources)
    parts = [_PREFACE]
    try:
        for study in studies:
            parts += [f"## {study.study}", tables(study)]
            parts += [
                f"![{caption}]({PICTURES}/{path.name})\n\n{caption}"
                for path, caption in draw_study(study, out / PICTURES)
            ]
            made = json.dumps(manifest(study.results), indent=2)
            parts.append(f"How it was made:\n\n```json\n{made}\n```")
        write_atomically(out / PAGE, "\n\n".join(parts) + "\n")
    except OSError as error:
        raise DataError(f"{out}: cannot write the report: {error}") from error
    return out / PAGE


def publish(folders: Sequence[Path], kept: Path) -> None:
    """Keep the runs of folders, one file per study; rewrite manifest, pictures and README.md."""
    for study in comparisons(folders):
        write_results(kept / f"{study.study}.parquet", study.results)
    studies = comparisons(sorted(kept.glob("*.parquet")))
    facts = {study.study: manifest(study.results) for study in studies}
    write_atomically(kept / "manifest.json", json.dumps(facts, indent=2) + "\n")
    blocks = {study.study: tables(study) for study in studies}
    page = kept / "README.md"
    write_atomically(page, fill(page.read_text(encoding="utf-8"), blocks, page))
    shutil.rmtree(kept / PICTURES, ignore_errors=True)
    for study in studies:
        draw_study(study, kept / PICTURES)


def manifest(results: Sequence[Result]) -> dict[str, Any]:
    """What some runs were made with."""
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


def tables(comparison: Comparison) -> str:
    """Markdown of a study: its setting, and a table for every regime."""
    parts = [comparison.setting]
    for regime in comparison.runs:
        table = _table(comparison.rows(regime))
        parts += [f"### {regime.title}", comparison.beginning(regime), table]
    return "\n\n".join(parts)


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


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows in Markdown; all have the same columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_shown(title, value) for title, value in row.items()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(title: str, value: Any) -> str:
    if isinstance(value, Interval):
        return value.shown(".2f" if title.startswith("P(") else ".3f")
    return "" if value is None else str(value)


if __name__ == "__main__":
    publish([Path(name) for name in sys.argv[1:]], results_directory())
