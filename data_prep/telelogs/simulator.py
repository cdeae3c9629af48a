"""Simulated 5G drive tests with exactly one injected root cause (synthetic TeleLogs).

A healthy drive is planned first from one random stream, whatever the cause; the fault then changes
the one thing it is about, with draws of its own stream; last, physics turns the plan into
measurements. So two drives with the same seed and different causes agree, digit for digit, in
every column that neither cause touches, and nothing but the fault can give a cause away.

What a drive test cannot show (the load of the cells, the rank and block error rate of the link) is
drawn, with the same distribution for every cause: SINR and throughput tell when the user suffers,
never why. The thresholds behind each cause are those of the TeleLogs causes (arXiv 2507.21974)
where the cause names one, and otherwise our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from data_prep.telelogs.network import (
    COLOCATED,
    NEAREST,
    SECOND,
    SERVING,
    Array,
    Cell,
    distance,
    link_gain,
    random_network,
    vertical_loss,
)

LOW_THROUGHPUT = 600.0  # Mbit/s: below it the user suffers


@dataclass
class DriveTest:
    """Measurements of one drive; arrays have one entry per second."""

    start: datetime
    cells: list[Cell]
    table_order: NDArray[np.int64]  # in which the cells are listed
    east: Array  # metres
    north: Array
    speed: Array  # km/h
    serving: NDArray[np.int64]  # index into cells
    rsrp: Array  # dBm, [rows, cells]
    sinr: Array  # dB
    throughput: Array  # Mbit/s
    scheduled_rbs: Array
    reported: NDArray[np.int64]  # neighbours that the terminal reports, at most 5

    @property
    def low(self) -> NDArray[np.bool_]:
        """Rows with a throughput below 600 Mbit/s."""
        return self.throughput < LOW_THROUGHPUT


@dataclass
class _Plan:
    """A drive before the physics; the fault edits it in place."""

    cells: list[Cell]
    bearing: float  # from the serving site to the road, radians
    road: tuple[float, float, float, float]  # east, north, heading, curvature per metre
    base_speed: float  # km/h, before fluctuations of at most 5
    speed_limits: tuple[float, float]
    level: float  # dBm of the serving cell in the middle of the low rows
    offsets: Array  # dB against the serving cell, per cell
    mean_rbs: float
    serving: NDArray[np.int64]
    low_rows: range
    last_target: int  # cell that a handover after the low rows goes to


def simulate(seed: Sequence[int], cause: str) -> DriveTest:
    """Simulate the drive of a seed, e.g. (seed, split, index), with one fault, "C1" to "C8"."""
    healthy = np.random.default_rng([*seed, 0])
    fault = np.random.default_rng([*seed, 1])
    plan = _plan(healthy)
    _FAULTS[cause](plan, fault)
    return _drive(plan, healthy)


def _plan(random: np.random.Generator) -> _Plan:
    """A healthy drive: its low rows have causes that no table shows."""
    rows = int(random.integers(9, 12))
    low_count = 5 if rows == 9 else int(random.integers(5, 7))
    first_low = int(random.integers(1, rows - low_count - 1))
    low_rows = range(first_low, first_low + low_count)
    serving = np.full(rows, SERVING)
    before, after = random.integers(COLOCATED, SECOND + 1, size=2)
    handover_before, handover_after = random.random(2) < (0.5, 0.8)
    if handover_before and first_low >= 2:
        serving[: random.integers(1, first_low)] = before
    # A healthy handover waits one good row: the drop ends before it, not by it.
    handover_row = int(random.integers(low_rows.stop + 1, rows))
    if handover_after:
        serving[handover_row:] = after

    road = (
        float(random.uniform(3000.0, 7200.0)),
        float(random.uniform(2850.0, 4900.0)),
        float(random.uniform(0.0, 2 * np.pi)),
        float(random.uniform(-0.003, 0.003)),
    )
    bearing = float(random.uniform(0.0, 2 * np.pi))
    cells = random_network(random, road[:2], bearing)
    colocated_is_near = random.random() < 0.5
    near, far = random.uniform((-2.5, -9.5), (-0.7, -5.5))
    offsets = np.concatenate(
        [
            [0.0, near if colocated_is_near else far],
            random.uniform((-7.0, -10.0), (-5.0, -7.5)),
            random.uniform(-26.0, -12.0, size=len(cells) - 4),
        ]
    )
    return _Plan(
        cells=cells,
        bearing=bearing,
        road=road,
        base_speed=float(random.uniform(6.0, 34.0)),
        speed_limits=(0.0, 39.0),
        level=float(random.uniform(-91.0, -75.0)),
        offsets=offsets,
        mean_rbs=float(random.uniform(166.0, 198.0)),
        serving=serving,
        low_rows=low_rows,
        last_target=int(after),
    )


def _too_much_downtilt(plan: _Plan, random: np.random.Generator) -> None:
    cell = plan.cells[SERVING]
    metres = float(np.hypot(plan.road[0] - cell.east, plan.road[1] - cell.north))
    before = vertical_loss(cell, metres)
    digital = cell.downtilt - cell.mechanical_downtilt
    # Mechanical plus digital; that of a healthy cell is at most 17 degrees.
    wanted = int(random.integers(32, 44, endpoint=True))
    cell.mechanical_downtilt = min(wanted - digital, 35)
    lost = float(vertical_loss(cell, metres) - before)
    # The complaint comes from the far end: the road lies where coverage just ends.
    plan.level = min(max(plan.level - lost, -94.0), -91.5)


def _too_far(plan: _Plan, random: np.random.Generator) -> None:
    metres = float(random.uniform(1150.0, 2800.0))
    site = plan.cells[SERVING].gnodeb_id
    for cell in plan.cells:
        if cell.gnodeb_id == site:
            cell.east = plan.road[0] - metres * float(np.sin(plan.bearing))
            cell.north = plan.road[1] - metres * float(np.cos(plan.bearing))


def _better_neighbour(plan: _Plan, random: np.random.Generator) -> None:
    """The drop ends in the very second in which the neighbour takes over."""
    del random
    plan.serving[plan.low_rows.stop :] = plan.last_target


def _overlapping_coverage(plan: _Plan, random: np.random.Generator) -> None:
    plan.offsets[[NEAREST, SECOND]] = random.uniform(-1.9, -0.5, size=2)


def _frequent_handovers(plan: _Plan, random: np.random.Generator) -> None:
    """Two excursions to the other sector of the site: four more handovers."""
    plan.offsets[COLOCATED] = random.uniform(-2.0, -0.7)
    first, stop = plan.low_rows.start, plan.low_rows.stop
    start = first + int(random.integers(0, 2))
    again = int(random.integers(start + 2, stop - 1))
    plan.serving[[start, again]] = COLOCATED


def _same_pci_residue(plan: _Plan, random: np.random.Generator) -> None:
    strong = [COLOCATED, NEAREST] if plan.offsets[COLOCATED] > -7.0 else [NEAREST]
    cell = plan.cells[int(random.choice(strong))]
    used = {other.pci for other in plan.cells}
    residue = plan.cells[SERVING].pci % 30
    free = [pci for pci in range(residue, 990, 30) if pci not in used]
    cell.pci = int(random.choice(free))


def _too_fast(plan: _Plan, random: np.random.Generator) -> None:
    plan.base_speed = float(random.uniform(48.0, 68.0))
    plan.speed_limits = (0.0, 75.0)


def _too_few_rbs(plan: _Plan, random: np.random.Generator) -> None:
    plan.mean_rbs = float(random.uniform(100.0, 152.0))


_FAULTS: dict[str, Callable[[_Plan, np.random.Generator], None]] = {
    "C1": _too_much_downtilt,
    "C2": _too_far,
    "C3": _better_neighbour,
    "C4": _overlapping_coverage,
    "C5": _frequent_handovers,
    "C6": _same_pci_residue,
    "C7": _too_fast,
    "C8": _too_few_rbs,
}


def _drive(plan: _Plan, random: np.random.Generator) -> DriveTest:
    rows, count = len(plan.serving), len(plan.cells)
    low = np.isin(np.arange(rows), plan.low_rows)
    fluctuation = np.clip(np.cumsum(random.normal(0.0, 1.5, size=rows)), -5.0, 5.0)
    speed = np.clip(plan.base_speed + fluctuation, *plan.speed_limits).round()
    # A gently curved road, whose point of reference is passed in the middle of the low rows.
    middle = (plan.low_rows.start + plan.low_rows.stop) // 2
    travelled = np.cumsum(speed / 3.6)
    travelled -= travelled[middle]
    east, north, heading, curvature = plan.road
    bend = curvature * travelled / 2
    east = east + travelled * np.sin(heading + bend)
    north = north + travelled * np.cos(heading + bend)

    sinr = np.where(
        low,
        random.normal(7.0, 3.5, size=rows).clip(-2.0, 13.0),
        random.normal(20.0, 4.0, size=rows).clip(14.0, 28.0),
    )
    noise = random.normal(0.0, 70.0, size=rows)
    throughput = np.where(
        low,
        np.clip(130.0 + 35.0 * sinr + noise, 0.5 + np.abs(noise) / 10, 585.0),
        np.clip(640.0 + 50.0 * (sinr - 14.0) + noise, 612.0, 1450.0),
    )
    wobble = random.normal(0.0, 0.05, size=rows).clip(-0.1, 0.1)
    return DriveTest(
        start=datetime(2025, 5, 1, 8)
        + timedelta(days=int(random.integers(0, 60)), seconds=int(random.integers(0, 39_000))),
        cells=plan.cells,
        table_order=random.permutation(count),
        east=east,
        north=north,
        speed=speed,
        serving=plan.serving,
        rsrp=_levels(plan, east, north, middle, random),
        sinr=sinr,
        throughput=throughput,
        scheduled_rbs=plan.mean_rbs * (1.0 + wobble - wobble.mean()),
        reported=random.choice([3, 4, 5], p=[0.15, 0.25, 0.6], size=rows),
    )


def _levels(
    plan: _Plan, east: Array, north: Array, middle: int, random: np.random.Generator
) -> Array:
    """RSRP of every cell, dBm, [rows, cells].

    The serving cell follows its link gain along the road. The others keep to
    their offsets against it, give or take 1 dB: the clutter that moves levels
    lies around the vehicle and is the same for all cells.
    """
    rows, count = len(east), len(plan.cells)
    gains = np.stack([link_gain(cell, east, north) for cell in plan.cells], axis=1)
    drift = gains - gains[middle]
    shadow = random.normal(0.0, 0.5, size=rows).clip(-1.0, 1.0)
    relative = 0.6 * np.tanh(drift - drift[:, :1])
    relative += random.normal(0.0, 0.3, size=(rows, count)).clip(-0.4, 0.4)
    relative[:, SERVING] = 0.0
    relative += plan.offsets
    lead = random.uniform(1.5, 3.5, size=count)
    for target in range(1, count):
        serves = plan.serving == target
        if serves.any():
            # A handover follows a level that rose: half-way one row before or after.
            beside = np.zeros(rows, dtype=bool)
            beside[:-1] |= serves[1:]
            beside[1:] |= serves[:-1]
            relative[beside, target] = (plan.offsets[target] + lead[target]) / 2
            relative[serves, target] = lead[target]
    level = plan.level + drift[:, SERVING] + shadow
    return level[:, None] + relative


def serving_distance(drive: DriveTest) -> Array:
    """Distance to the serving cell in each row, metres."""
    all_metres = np.stack([distance(cell, drive.east, drive.north) for cell in drive.cells], axis=1)
    return all_metres[np.arange(len(drive.serving)), drive.serving]
