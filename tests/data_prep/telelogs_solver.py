"""A rule-based solver that reads nothing but the text of a TeleLogs question.

It shares no code with the generator: own parser, own distances, own thresholds,
in the order of the rules that are known for TeleLogs.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import mean

KEYWORDS = {
    "speed": "40 km/h",
    "distance": "1 km",
    "handovers": "handovers",
    "rbs": "rbs",
    "residue": "mod 30",
    "overlap": "overlap",
    "tilt": "downtilt",
    "neighbour": "higher throughput",
}


@dataclass
class Question:
    causes: dict[str, str]  # rule -> number
    drive: list[dict[str, str]]  # rows of the first table, by time
    cells: list[dict[str, str]]  # rows of the second table


def parse(text: str) -> Question:
    causes: dict[str, str] = {}
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line[:1] == "C" and line[1:2].isdigit() and line[2:3] == ":":
            said = line.lower().replace("a higher", "higher")
            (rule,) = [rule for rule, keyword in KEYWORDS.items() if keyword in said]
            causes[rule] = line[:2]
        if "|" in line:
            if not inside:
                tables.append([])
            tables[-1].append(line.split("|"))
        inside = "|" in line
    drive, cells = ([dict(zip(t[0], row, strict=True)) for row in t[1:]] for t in tables)
    drive.sort(key=lambda row: row["Timestamp"])
    return Question(causes, drive, cells)


def solve(text: str) -> str:
    """The number of the first cause, in the known order of the rules, whose rule holds."""
    question = parse(text)
    return next((question.causes[rule] for rule in rules_that_hold(question)), "none")


def rules_that_hold(question: Question) -> list[str]:
    """Each rule is judged by itself, without knowing what the others say."""
    drive = question.drive
    cells = {cell["PCI"]: cell for cell in question.cells}
    serving = [row["5G KPI PCell RF Serving PCI"] for row in drive]
    own = [float(row["5G KPI PCell RF Serving SS-RSRP [dBm]"]) for row in drive]
    rates = [float(row["5G KPI PCell Layer2 MAC DL Throughput [Mbps]"]) for row in drive]
    low = [i for i, rate in enumerate(rates) if rate < 600]
    changes = [i for i in range(1, len(drive)) if serving[i] != serving[i - 1]]
    usual = cells[Counter(serving[i] for i in low).most_common(1)[0][0]]
    digital = int(usual["Digital Tilt"])
    tilt = int(usual["Mechanical Downtilt"]) + (6 if digital == 255 else digital)

    residue = overlap = 0
    for i in low:
        near = [(pci, level - own[i]) for pci, level in _neighbours(drive[i])]
        residue += any(gap > -9.5 and int(pci) % 30 == int(serving[i]) % 30 for pci, gap in near)
        site = cells[serving[i]]["gNodeB ID"]
        overlap += sum(gap > -3 and cells[pci]["gNodeB ID"] != site for pci, gap in near) >= 2
    rules = {
        "speed": max(float(row["GPS Speed (km/h)"]) for row in drive) > 40,
        "distance": mean(_haversine(drive[i], cells[serving[i]]) for i in low) > 1000,
        "handovers": len(changes) >= 3,
        "rbs": mean(float(row["5G KPI PCell Layer1 DL RB Num (Including 0)"]) for row in drive)
        < 160,
        "residue": residue > len(low) / 2,
        "overlap": overlap > len(low) / 2,
        "tilt": tilt >= 28 and mean(own[i] for i in low) < -88,
        "neighbour": any(
            rates[i - 1] < 600 and i + 1 < len(drive) and min(rates[i : i + 2]) >= 600
            for i in changes
        ),
    }
    return [rule for rule, holds in rules.items() if holds]


def _neighbours(row: dict[str, str]) -> list[tuple[str, float]]:
    top = "Measurement PCell Neighbor Cell Top Set(Cell Level) Top"
    found = [
        (row[f"{top} {rank} PCI"], row[f"{top} {rank} Filtered Tx BRSRP [dBm]"])
        for rank in range(1, 6)
    ]
    return [(pci, float(level)) for pci, level in found if pci != "-"]


def _haversine(a: dict[str, str], b: dict[str, str]) -> float:
    lon_a, lat_a, lon_b, lat_b = (
        math.radians(float(place[name])) for place in (a, b) for name in ("Longitude", "Latitude")
    )
    chord = (
        math.sin((lat_b - lat_a) / 2) ** 2
        + math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    )
    return 2 * 6_371_000 * math.asin(math.sqrt(chord))
