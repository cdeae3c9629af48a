"""What all regimes together say on the questions of `recipes/lab/results/comparisons.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from hpo_verl.errors import ConfigError, DataError
from hpo_verl.report.comparison import Comparison
from hpo_verl.report.markdown import markdown_table, percent
from hpo_verl.report.regimes import Regime
from hpo_verl.report.statistics import CONFIDENCE, Effect

LEAST_PAIRS = 10
"""Pairs from which on a regime counts."""
STRONG_REGIMES, STRONG_SHARE = 4, 0.75
_KEYS = {"question", "ours", "theirs"}

RULE = (
    f"A regime counts with {LEAST_PAIRS} pairs or more: better or worse where the "
    f"{percent(CONFIDENCE)} interval of the area's difference excludes 0, else undecided. The same "
    "regime in two studies counts once, where it has more pairs. **Strong**: "
    f"{STRONG_REGIMES} regimes or more, better in {percent(STRONG_SHARE)} of them at least, worse "
    "in none. **Depends**: better in some and worse in others, each in more than by chance, and "
    "neither in twice as many as the other. **Weak**: better in more regimes than worse, by more "
    "than chance. **None**: none of these. **Against** and **strongly against** are the mirror "
    'images of weak and strong. "By chance" is the number of regimes, '
    f"{percent(1 - CONFIDENCE)} of them, whose interval would exclude 0 if nothing differed; "
    "intervals of so few pairs are somewhat too narrow, so that chance gives more."
)


class Question(NamedTuple):
    """Whether one variant is better than another."""

    question: str
    ours: str
    theirs: str


def read_questions(path: Path) -> list[Question]:
    """Read the questions of a file.

    Raises:
        ConfigError: The file does not hold a list of `question`, `ours` and `theirs`, all texts.
    """
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, list):
        raise ConfigError(f"{path}: must hold a list")
    for number, entry in enumerate(found, 1):
        if not isinstance(entry, dict) or set(entry) != _KEYS:
            raise ConfigError(f"{path}: entry {number} must have {', '.join(sorted(_KEYS))}")
    return [Question(**{key: str(value) for key, value in entry.items()}) for entry in found]


def strength(effects: Sequence[Effect]) -> str:
    """The strength of a recommendation from one effect per regime, by `RULE`."""
    better, worse = (sum(getattr(found, side) for found in effects) for side in ("better", "worse"))
    if not effects:
        return "not measured"
    if len(effects) >= STRONG_REGIMES:
        for name, ours, others in (("strong", better, worse), ("strongly against", worse, better)):
            if ours >= STRONG_SHARE * len(effects) and not others:
                return name
    few, many = sorted((better, worse))
    if few > _by_chance(effects) and many < 2 * few:
        return "depends"
    if many - few <= _by_chance(effects):
        return "none"
    return "weak" if better > worse else "against"


def _by_chance(effects: Sequence[Effect]) -> float:
    """Regimes that would count as better or worse if nothing differed."""
    return (1 - CONFIDENCE) * len(effects)


def recommendations(studies: Sequence[Comparison], questions: Sequence[Question]) -> str:
    """Markdown table: a row per question, and one more for each one's best learning rate."""
    rows = []
    for question in questions:
        for tuned in (False, True):
            found = list(
                _effects([study for study in studies if study.plan.tuned == tuned], question)
            )
            if found or not tuned:
                rows.append(_row(question, found, tuned))
    return markdown_table(rows)


def _row(question: Question, found: Sequence[Effect], tuned: bool) -> dict[str, Any]:
    better, worse = (sum(getattr(one, side) for one in found) for side in ("better", "worse"))
    points = [one.difference.point for one in found if one.difference is not None]
    return {
        "question": question.question,
        "compared": f"`{question.ours}` - `{question.theirs}`",
        "learning rate": "each one's best" if tuned else "the same",
        "regimes": len(found),
        "better": better,
        "worse": worse,
        "undecided": len(found) - better - worse,
        "by chance": format(_by_chance(found), ".1f"),
        "median effect": format(median(points), "+.3f") if points else None,
        "strength": strength(found),
    }


def _effects(studies: Sequence[Comparison], question: Question) -> Iterator[Effect]:
    """Effects of all regimes with enough pairs; of a regime in several studies one."""
    best: dict[Regime, Effect] = {}
    for study in studies:
        for regime in study.runs:
            found = study.effect(regime, question.ours, question.theirs)
            if found.pairs > best.get(regime, Effect(LEAST_PAIRS - 1, None)).pairs:
                best[regime] = found
    yield from best.values()


def require_known(path: Path, questions: Sequence[Question], studies: Sequence[Comparison]) -> None:
    """Refuse a question about a variant that no study has, by a DataError."""
    known = {variant for study in studies for variant in study.variants}
    for question in questions:
        for name in (question.ours, question.theirs):
            if name not in known:
                raise DataError(f"{path}: {name!r} is no variant of a study: {sorted(known)}")
