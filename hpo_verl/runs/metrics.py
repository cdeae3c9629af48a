"""Reads the metrics that verl's file logger writes while a run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PREFIX = "val-core/"
_PASS_AT_K = re.compile(r"val-core/.*/(?:acc|reward)/pass@(\d{1,9})")
# verl validates by a reward's `acc` where there is one, else by its score.
_REWARD_OF = "reward of "


@dataclass
class MetricsFile:
    """The complete lines read so far of a `metrics.jsonl`, which may not exist yet."""

    path: Path
    rows: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    _offset: int = 0

    def read_new(self) -> list[tuple[int, Mapping[str, float]]]:
        """Read the lines that were completed since the last call, and return them."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            text = stream.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        new = []
        for line in complete.splitlines():
            row = json.loads(line)
            new.append((int(row["step"]), row["data"]))
        self.rows.extend(new)
        return new

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values at which a metric was logged."""
        pairs = [(step, data[key]) for step, data in self.rows if data.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def success(self) -> tuple[list[int], list[float]]:
        """Steps and success rates (fraction) of the validations; over data sources, their mean."""
        found = [(step, _validated(data)) for step, data in self.rows]
        validated = [(step, list(values.values())) for step, values in found if values]
        return [step for step, _ in validated], [sum(v) / len(v) for _, v in validated]

    def pass_at_k(self) -> dict[int, tuple[list[int], list[float]]]:
        """By k, steps and pass@k (fraction) of the validations; over data sources, their mean."""
        series: dict[int, tuple[list[int], list[float]]] = {}
        for step, data in self.rows:
            found: dict[int, list[float]] = {}
            for key, value in data.items():
                name = _PASS_AT_K.fullmatch(key)
                if name:
                    found.setdefault(int(name[1]), []).append(value)
            for k, values in found.items():
                steps, means = series.setdefault(k, ([], []))
                steps.append(step)
                means.append(sum(values) / len(values))
        return dict(sorted(series.items()))

    def sources(self) -> list[str]:
        """Data sources of the validations; `reward of SOURCE` where the reward has no `acc`."""
        return sorted({source for _, data in self.rows for source in _validated(data)})


def measured(sources: Sequence[str]) -> str:
    """What a success rate is, after a comma; empty for the accuracy on the only source."""
    names = ", ".join(sources)
    if len(sources) > 1:
        return f", mean of {names}"
    return f", {names}" if names.startswith(_REWARD_OF) else ""


def has_validation(data: Mapping[str, float]) -> bool:
    """Whether a row holds the success rate of a validation."""
    return bool(_validated(data))


def _validated(data: Mapping[str, float]) -> dict[str, float]:
    """Success by data source."""
    found = {}
    for key, value in data.items():
        source, *rest = key.removeprefix(_PREFIX).rsplit("/", 2)
        if key.startswith(_PREFIX) and len(rest) == 2 and rest[1].startswith("mean@"):
            found[source if rest[0] == "acc" else f"{_REWARD_OF}{source}"] = value
    return found
