"""The question about a simulated drive, as text: that of TeleLogs, and nine letters.

The structure (task, eight causes, notes on tilt and beamwidth, two pipe tables), the columns, units
and number formats are those of TeleLogs; the sentences are our own.
"""

from __future__ import annotations

from bisect import bisect_right
from datetime import timedelta

import numpy as np

from data_prep.telelogs.network import Cell, longitude_and_latitude
from data_prep.telelogs.simulator import DriveTest, serving_distance

_TASK = """\
The drive test and the engineering parameters below come from a 5G network. On part of the road \
the downlink throughput of the vehicle falls below 600 Mbps. Find out why.
Exactly one of the eight causes below explains the drop. Choose the most likely one and give its \
number in \\boxed{{}} at the end of your answer.
"""
_CAUSES = {
    "C1": "The downtilt of the serving cell is too large, so coverage is weak at the far end.",
    "C2": "The serving cell covers a distance of more than 1 km: it over-shoots.",
    "C3": "A neighbouring cell provides a higher throughput than the serving cell.",
    "C4": "Neighbouring cells on the same frequency and at other sites overlap severely with the "
    "serving cell.",
    "C5": "Frequent handovers interrupt the transmission.",
    "C6": "A neighbouring cell has the same PCI mod 30 as the serving cell, which causes "
    "interference.",
    "C7": "The test vehicle drives faster than 40 km/h.",
    "C8": "The average number of scheduled RBs is below 160.",
}
_NOTES = """\
Given:
- A digital tilt of 255 stands for the default of 6 degrees; other values are degrees.
- The beam scenario sets the vertical beamwidth: DEFAULT and SCENARIO_1 to SCENARIO_5 have 6 \
degrees, SCENARIO_6 to SCENARIO_11 have 12 degrees, SCENARIO_12 and above have 25 degrees.
"""
_HEAD = "\n".join([_TASK, *(f"{cause}: {text}" for cause, text in _CAUSES.items()), "", _NOTES])
# The misspelling is the dataset's.
_USER_PLANE_TITLE = "User plane drive test data as follows："
_ENGINEERING_TITLE = "Engeneering parameters data as follows："
_TOP = "Measurement PCell Neighbor Cell Top Set(Cell Level) Top"
# Each feature's bin edges (rising), and one letter per bin.
FEATURES = (
    ((20, 40), "ABC"),  # highest speed, km/h
    ((600, 1000), "DEF"),  # distance to the serving cell, m
    ((1, 3), "GHI"),  # changes of the serving cell
    ((160, 182), "JKL"),  # mean scheduled RBs
    ((-40, -10), "MNO"),  # level of the strongest neighbour of equal PCI mod 30, dB
    ((2,), "PQ"),  # neighbours of other sites within 3 dB
    ((10, 28), "RST"),  # downtilt of the serving cell, degrees
    ((-90, -80), "UVW"),  # RSRP of the serving cell, dBm
    ((1,), "XY"),  # a handover ends the drop
)


def expert_answer(cause: str, prompt: str) -> str:
    """The simulator's answer to imitate; to the question in words, the cause in words first."""
    box = f"\\boxed{{{cause}}}"
    return box if prompt == "tiny" else f"{_CAUSES[cause]}\n{box}"


def render(drive: DriveTest) -> str:
    """Return the question about a simulated drive."""
    user_plane = _table([_user_plane_row(drive, row) for row in range(len(drive.serving))])
    engineering = _table([_engineering_row(drive.cells[index]) for index in drive.table_order])
    parts = [_HEAD, _USER_PLANE_TITLE, user_plane, "", _ENGINEERING_TITLE, engineering, ""]
    return "\n".join(parts)


def _table(rows: list[dict[str, str]]) -> str:
    """The columns' names, then the rows."""
    return "\n".join(["|".join(rows[0]), *("|".join(row.values()) for row in rows)])


def _user_plane_row(drive: DriveTest, row: int) -> dict[str, str]:
    serving, levels = int(drive.serving[row]), drive.rsrp[row].tolist()
    pcis = [cell.pci for cell in drive.cells]
    neighbours = [cell for cell in range(len(pcis)) if cell != serving]
    neighbours.sort(key=levels.__getitem__, reverse=True)
    reported = neighbours[: int(drive.reported[row])]
    blanks = ["-"] * (5 - len(reported))
    ranked_pcis = [*(f"{pcis[cell]}" for cell in reported), *blanks]
    ranked_levels = [*(f"{levels[cell]:.2f}" for cell in reported), *blanks]
    return {
        "Timestamp": f"{drive.start + timedelta(seconds=row):%Y-%m-%d %H:%M:%S}.000000",
        **longitude_and_latitude(drive.east[row], drive.north[row]),
        "GPS Speed (km/h)": f"{drive.speed[row]:.0f}",
        "5G KPI PCell RF Serving PCI": f"{pcis[serving]}",
        "5G KPI PCell RF Serving SS-RSRP [dBm]": f"{levels[serving]:.2f}",
        "5G KPI PCell RF Serving SS-SINR [dB]": f"{drive.sinr[row]:.2f}",
        "5G KPI PCell Layer2 MAC DL Throughput [Mbps]": f"{drive.throughput[row]:.2f}",
        **{f"{_TOP} {rank} PCI": pci for rank, pci in enumerate(ranked_pcis, 1)},
        **{
            f"{_TOP} {rank} Filtered Tx BRSRP [dBm]": level
            for rank, level in enumerate(ranked_levels, 1)
        },
        "5G KPI PCell Layer1 DL RB Num (Including 0)": f"{drive.scheduled_rbs[row]:.2f}",
    }


def _engineering_row(cell: Cell) -> dict[str, str]:
    return {
        "gNodeB ID": cell.gnodeb_id,
        "Cell ID": f"{cell.cell_id}",
        **longitude_and_latitude(cell.east, cell.north),
        "Mechanical Azimuth": f"{cell.mechanical_azimuth}",
        "Mechanical Downtilt": f"{cell.mechanical_downtilt}",
        "Digital Tilt": f"{cell.digital_tilt}",
        "Digital Azimuth": f"{cell.digital_azimuth}",
        "Beam Scenario": cell.beam_scenario,
        "Height": f"{cell.height:.1f}",
        "PCI": f"{cell.pci}",
        "TxRx Mode": cell.txrx_mode,
        "Max Transmit Power": f"{cell.max_transmit_power}",
        "Antenna Model": cell.antenna_model,
    }


def tiny_prompt(drive: DriveTest) -> str:
    r"""Return the nine letters of a drive, in the order of `FEATURES`: for the tiny CPU policy.

    This is not TeleLogs: a policy of 0.15 million parameters cannot read 2,500 tokens of tables.
    Nine features are computed from the measurements (never from the injected cause), and each is
    put in one of two or three bins that have a letter of their own. The answer is `\boxed{C3}` as
    in the full task.
    """
    return "".join(
        letters[bisect_right(edges, value)]
        for (edges, letters), value in zip(FEATURES, _features(drive), strict=True)
    )


def _features(drive: DriveTest) -> list[float]:
    """The features' values; levels are medians over the rows below 600 Mbit/s."""
    low = np.flatnonzero(drive.low)
    serving_id = int(np.bincount(drive.serving[low]).argmax())
    serving = drive.cells[serving_id]
    changes = np.flatnonzero(np.diff(drive.serving)) + 1
    own = drive.rsrp[low, drive.serving[low]]
    relative = np.median(drive.rsrp[low] - own[:, None], axis=0)
    others = [index for index in range(len(drive.cells)) if index != serving_id]
    same_residue = [
        relative[index] for index in others if (drive.cells[index].pci - serving.pci) % 30 == 0
    ]
    other_sites = [index for index in others if drive.cells[index].gnodeb_id != serving.gnodeb_id]
    return [
        float(drive.speed.max()),
        float(np.median(serving_distance(drive)[low])),
        len(changes),
        float(drive.scheduled_rbs.mean()),
        float(max(same_residue, default=-np.inf)),
        sum(relative[index] > -3.0 for index in other_sites),
        serving.downtilt,
        float(np.median(own)),
        float(low[-1] + 1 in changes),
    ]
