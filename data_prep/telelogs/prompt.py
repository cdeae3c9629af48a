"""The TeleLogs question about a simulated drive, as text.

The structure (task, eight causes, notes on tilt and beamwidth, two pipe
tables), the columns, units and number formats are those of TeleLogs; the
sentences are our own.
"""

from __future__ import annotations

from datetime import timedelta

import numpy as np

from data_prep.telelogs.network import to_latitude, to_longitude
from data_prep.telelogs.simulator import DriveTest

MISSING = "-"
NEIGHBOURS = range(1, 6)

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
# The misspelling is the dataset's.
USER_PLANE_TITLE = "User plane drive test data as follows："
ENGINEERING_TITLE = "Engeneering parameters data as follows："
_TOP = "Measurement PCell Neighbor Cell Top Set(Cell Level) Top"
USER_PLANE_COLUMNS = (
    "Timestamp",
    "Longitude",
    "Latitude",
    "GPS Speed (km/h)",
    "5G KPI PCell RF Serving PCI",
    "5G KPI PCell RF Serving SS-RSRP [dBm]",
    "5G KPI PCell RF Serving SS-SINR [dB]",
    "5G KPI PCell Layer2 MAC DL Throughput [Mbps]",
    *(f"{_TOP} {rank} PCI" for rank in NEIGHBOURS),
    *(f"{_TOP} {rank} Filtered Tx BRSRP [dBm]" for rank in NEIGHBOURS),
    "5G KPI PCell Layer1 DL RB Num (Including 0)",
)
ENGINEERING_COLUMNS = (
    "gNodeB ID",
    "Cell ID",
    "Longitude",
    "Latitude",
    "Mechanical Azimuth",
    "Mechanical Downtilt",
    "Digital Tilt",
    "Digital Azimuth",
    "Beam Scenario",
    "Height",
    "PCI",
    "TxRx Mode",
    "Max Transmit Power",
    "Antenna Model",
)
_HEAD = "\n".join([_TASK, *(f"{cause}: {text}" for cause, text in _CAUSES.items()), "", _NOTES])


def render(drive: DriveTest) -> str:
    """Return the question about a simulated drive."""
    return "\n".join(
        [
            _HEAD,
            USER_PLANE_TITLE,
            "|".join(USER_PLANE_COLUMNS),
            *_user_plane_rows(drive),
            "",
            ENGINEERING_TITLE,
            "|".join(ENGINEERING_COLUMNS),
            *_engineering_rows(drive),
            "",
        ]
    )


def _user_plane_rows(drive: DriveTest) -> list[str]:
    pcis = [cell.pci for cell in drive.cells]
    longitudes = np.asarray(to_longitude(drive.east)).tolist()
    latitudes = np.asarray(to_latitude(drive.north)).tolist()
    lines: list[str] = []
    for row, levels in enumerate(drive.rsrp.tolist()):
        serving = int(drive.serving[row])
        neighbours = [cell for cell in range(len(pcis)) if cell != serving]
        neighbours.sort(key=levels.__getitem__, reverse=True)
        neighbours = neighbours[: int(drive.reported[row])]
        blanks = [MISSING] * (len(NEIGHBOURS) - len(neighbours))
        cells = [
            f"{drive.start + timedelta(seconds=row):%Y-%m-%d %H:%M:%S}.000000",
            f"{longitudes[row]:.6f}",
            f"{latitudes[row]:.6f}",
            f"{drive.speed[row]:.0f}",
            f"{pcis[serving]}",
            f"{levels[serving]:.2f}",
            f"{drive.sinr[row]:.2f}",
            f"{drive.throughput[row]:.2f}",
            *(f"{pcis[cell]}" for cell in neighbours),
            *blanks,
            *(f"{levels[cell]:.2f}" for cell in neighbours),
            *blanks,
            f"{drive.scheduled_rbs[row]:.2f}",
        ]
        lines.append("|".join(cells))
    return lines


def _engineering_rows(drive: DriveTest) -> list[str]:
    lines: list[str] = []
    for index in drive.table_order:
        cell = drive.cells[index]
        cells = [
            cell.gnodeb_id,
            f"{cell.cell_id}",
            f"{to_longitude(cell.east):.6f}",
            f"{to_latitude(cell.north):.6f}",
            f"{cell.mechanical_azimuth}",
            f"{cell.mechanical_downtilt}",
            f"{cell.digital_tilt}",
            f"{cell.digital_azimuth}",
            cell.beam_scenario,
            f"{cell.height:.1f}",
            f"{cell.pci}",
            cell.txrx_mode,
            f"{cell.max_transmit_power}",
            cell.antenna_model,
        ]
        lines.append("|".join(cells))
    return lines
