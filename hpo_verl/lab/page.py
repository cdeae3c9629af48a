"""The report: one HTML page that needs nothing else, the pictures, and `results.parquet`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from hpo_verl.errors import DataError
from hpo_verl.lab.comparison import BASELINE, Comparison, Row
from hpo_verl.lab.pictures import Picture, draw_all
from hpo_verl.lab.results import (
    Result,
    long_table,
    manifest,
    read_sources,
    require_same_settings,
    write_table,
)
from hpo_verl.lab.settings import variant_order
from hpo_verl.lab.statistics import (
    COLLAPSE_FRACTION,
    FINAL_SHARE,
    RESAMPLES,
    THRESHOLD_FACTOR,
    shown,
)
from hpo_verl.runs.files import write_atomically

RESULTS = "results.parquet"
_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --back: #fff; --line: #ccc; --soft: #f3f3f3 }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --back: #161616; --line: #444; --soft: #242424 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--back) }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
figure { margin: 1.5rem 0 } figcaption, .note { font-size: 13px }
pre { background: var(--soft); padding: .6rem; overflow-x: auto; font-size: 12px }
@media print { body { max-width: none; margin: 0 } figure, table { break-inside: avoid } }
"""
_MEASURES = {
    "final": "final", "area": "area", "at_10": "at 10 %", "at_25": "at 25 %", "at_50": "at 50 %",
    "steps_to_threshold": "steps to threshold",
}  # fmt: skip


def write_report(
    sources: Sequence[Path], out: Path, announce: Callable[[str], None] = lambda text: None
) -> Path:
    """Write the page, the pictures and `results.parquet`.

    Args:
        sources: Folders of `hpo-verl lab run`, or files that this function wrote earlier.
        out: Folder for `index.html`, `results.parquet` and `pictures/`.
        announce: Told what is being drawn.

    Returns:
        The page.

    Raises:
        ConfigError: A source holds nothing, or runs that cannot be compared.
        DataError: A file is damaged or cannot be written.
    """
    by_study = read_sources(sources)
    for study, results in by_study.items():
        require_same_settings(Path(study), [result.cell for result in results])
    every = [result for results in by_study.values() for result in results]
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        sections = []
        for study, results in by_study.items():
            announce(f"{study}: {len(results)} runs")
            comparison = Comparison(study, results, variant_order(study))
            pictures = draw_all(comparison, out / "pictures")
            sections.append(_section(comparison, results, pictures))
        write_table(out / RESULTS, long_table(every))
        write_atomically(out / "index.html", _page(sections, every))
    except OSError as error:
        raise DataError(f"{out}: cannot write the report: {error}") from error
    return out / "index.html"


def _section(comparison: Comparison, results: Sequence[Result], pictures: list[Picture]) -> str:
    training = results[0].cell["training"]
    evaluation = results[0].cell["evaluation"]
    parts = [
        f"<h2>Study {escape(comparison.study)}</h2>",
        f"<p>{len(results)} runs of {training['steps']} steps: {training['prompts_per_step']} "
        f"prompts with {training['responses_per_prompt']} responses each, "
        f"{training['mini_batches']} optimizer steps (AdamW, gradient norm clipped to "
        f"{training['max_grad_norm']:g}) per step; success on {evaluation['questions']} held-out "
        f"questions every {evaluation['every']} steps. {_rates(comparison)} "
        "Clip range, aggregation and the like are those of recipes/algo, changed where a method's "
        "name says so.</p>",
    ]
    tables = [(regime.title, [regime]) for regime in comparison.regimes]
    if len(tables) > 1:
        tables.append(("All regimes, pooled", comparison.regimes))
    for title, regimes in tables:
        parts.append(f"<h3>{escape(title)}</h3>")
        if len(regimes) == 1:
            parts.append(f"<p class=note>{comparison.beginning(regimes[0])}</p>")
        parts.append(_table(comparison.rows(regimes)))
    parts += [_figure(picture) for picture in pictures]
    return "\n".join(parts)


def _rates(comparison: Comparison) -> str:
    if not comparison.tuned:
        rates = sorted(set(comparison.rates.values()))
        return f"Learning rate {', '.join(f'{rate:g}' for rate in rates)}."
    seeds = ", ".join(map(str, sorted(comparison.tuned)))
    return (
        f"Each method has the learning rate with the largest mean area on seeds {seeds}; "
        "those seeds are left out of every comparison."
    )


def _table(rows: Sequence[Row]) -> str:
    header = [
        "method", "learning rate", "runs", "collapsed", "reached", *_MEASURES.values(),
        f"final − {BASELINE}", f"area − {BASELINE}", "P(better final)", "P(better area)",
        "responses / step",
    ]  # fmt: skip
    lines = []
    for row in rows:
        cells = [
            row.variant, f"{row.learning_rate:g}", str(row.runs), str(row.collapses),
            f"{row.reached}/{row.runs}",
            *(shown(row.measures[n], 1 if n == "steps_to_threshold" else 3) for n in _MEASURES),
            *(shown(row.differences.get(n), 3) for n in ("final", "area")),
            *(shown(row.improvement.get(n), 2) for n in ("final", "area")),
            f"{row.responses:.0f}",
        ]  # fmt: skip
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _figure(picture: Picture) -> str:
    data = {
        theme: "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
        for theme, path in picture.svg.items()
    }
    caption = escape(picture.caption)
    return (
        f'<figure><picture><source media="print" srcset="{data["light"]}">'
        f'<source media="(prefers-color-scheme: dark)" srcset="{data["dark"]}">'
        f'<img src="{data["light"]}" alt="{caption}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _page(sections: Sequence[str], results: Sequence[Result]) -> str:
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>hpo_verl: comparison of algorithms</title><style>{_STYLE}</style>
<h1>Comparison of algorithms</h1>
<p>Interquartile mean over seeds with 95 % percentile bootstrap intervals ({RESAMPLES} resamples,
stratified by regime), paired differences from {BASELINE} by seed, and probability of improvement
(<a href="https://arxiv.org/abs/2108.13264">arXiv 2108.13264</a>), computed with scipy.
Final: mean over the last {FINAL_SHARE:.0%} of the budget. Area: under the success curve, divided
by the budget. Threshold: {THRESHOLD_FACTOR:g} times the warm start's success; a run that never
reaches it counts with the whole budget. Collapsed: final success below {COLLAPSE_FRACTION:.0%} of
the first one, or diverged; such runs are in every number. A method that drops groups samples more
responses per step: see the last column. Small policies and synthetic tasks: nothing here is a
statement about large models.</p>
{"".join(sections)}
<h2>How it was made</h2><pre>{escape(json.dumps(manifest(results), indent=2))}</pre>
</html>
"""
