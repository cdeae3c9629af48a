"""The radio network of the synthetic TeleLogs: cells, antennas, path loss.

Positions are metres east and north of the simulated area's south-west corner;
angles are degrees, azimuths clockwise from north, downtilts below the horizon.
Simplified from 3GPP TR 38.901 (path loss, antenna pattern).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ORIGIN_LONGITUDE = 128.13
ORIGIN_LATITUDE = 32.56
METRES_PER_DEGREE = 111_195.0  # of latitude, on a sphere of 6371 km

CARRIER_GHZ = 3.5
HORIZONTAL_BEAMWIDTH = 65.0  # degrees
RECEIVER_HEIGHT = 1.5  # metres

# A digital tilt of 255 in the table is a marker for the default of 6 degrees.
DIGITAL_TILT_DEFAULT = 255
# Parts that the first cells of a network play.
SERVING, COLOCATED, NEAREST, SECOND = range(4)
DISTANCE_NORMAL = (350.0, 850.0)  # metres from the road to the serving site
BEAM_SCENARIOS = ("DEFAULT", *(f"SCENARIO_{number}" for number in range(1, 17)))


@dataclass
class Cell:
    """One row of the engineering parameters."""

    gnodeb_id: str
    cell_id: int
    east: float
    north: float
    mechanical_azimuth: int
    mechanical_downtilt: int
    digital_tilt: int
    digital_azimuth: int
    beam_scenario: str
    height: float
    pci: int
    txrx_mode: str
    max_transmit_power: float
    antenna_model: str

    @property
    def downtilt(self) -> int:
        """Mechanical plus effective digital downtilt, degrees."""
        default = self.digital_tilt == DIGITAL_TILT_DEFAULT
        return self.mechanical_downtilt + (6 if default else self.digital_tilt)

    @property
    def azimuth(self) -> int:
        """Mechanical plus digital azimuth, degrees."""
        return (self.mechanical_azimuth + self.digital_azimuth) % 360

    @property
    def vertical_beamwidth(self) -> int:
        """Vertical beamwidth of the beam scenario, degrees: 6, 12 or 25."""
        scenario = BEAM_SCENARIOS.index(self.beam_scenario)
        return 6 if scenario <= 5 else 12 if scenario <= 11 else 25


def distance(cell: Cell, east: Array, north: Array) -> Array:
    """Ground distance from the cell to each position, metres."""
    return np.hypot(east - cell.east, north - cell.north)


def vertical_loss(cell: Cell, metres: Array | float) -> Array:
    """Loss against the main lobe, dB, at a ground distance: 12 (angle / beamwidth)^2, bounded."""
    depression = np.degrees(np.arctan2(cell.height - RECEIVER_HEIGHT, metres))
    off_axis = (depression - cell.downtilt) / cell.vertical_beamwidth
    # 3GPP allows 30 dB; reflections fill the gap under the beam.
    return np.minimum(12.0 * off_axis**2, 18.0)


def link_gain(cell: Cell, east: Array, north: Array) -> Array:
    """Antenna gain minus line-of-sight path loss, dB, up to a constant.

    The simulator settles the constant by choosing the received level at one position.
    """
    metres = np.maximum(distance(cell, east, north), 10.0)
    bearing = np.degrees(np.arctan2(east - cell.east, north - cell.north))
    off_axis = (bearing - cell.azimuth + 180.0) % 360.0 - 180.0
    horizontal = np.minimum(12.0 * (off_axis / HORIZONTAL_BEAMWIDTH) ** 2, 25.0)
    path_loss = 28.0 + 22.0 * np.log10(metres) + 20.0 * math.log10(CARRIER_GHZ)
    return -horizontal - vertical_loss(cell, metres) - path_loss


def longitude_and_latitude(east: float, north: float) -> dict[str, str]:
    """Degrees of a position in the area, as columns of a table."""
    metres_per_degree = METRES_PER_DEGREE * math.cos(math.radians(ORIGIN_LATITUDE))
    return {
        "Longitude": f"{ORIGIN_LONGITUDE + east / metres_per_degree:.6f}",
        "Latitude": f"{ORIGIN_LATITUDE + north / METRES_PER_DEGREE:.6f}",
    }


def random_network(
    random: np.random.Generator, road: tuple[float, float], bearing: float
) -> list[Cell]:
    """Six to eight healthy cells of three or four sites around a point of the road.

    The first four play the parts SERVING to SECOND. The bearing leads from the serving
    site to the point, radians from north.
    """
    count = int(random.integers(6, 9))
    # The serving site has the cells 0 and 1, its neighbours the cells 2 and 3.
    # No site gets more than three sectors.
    further = random.permutation([0, 1, 1, 2, 2, 3, 3, 3])[: count - 4]
    sites = [0, 0, 1, 2, *further.tolist()]
    site_ids = random.choice(100, size=4, replace=False)
    metres = random.uniform((DISTANCE_NORMAL[0], 300, 300, 300), (DISTANCE_NORMAL[1], *[2000] * 3))
    # A quarter turn apart, so that different sites never share a mast.
    directions = (
        bearing + np.arange(4) * np.pi / 2 + random.uniform(-0.5, 0.5, size=4) * (0, 1, 1, 1)
    )
    heights = random.uniform((15, 3, 3, 3), (45, 78, 78, 78)).round(1)
    facing = random.integers(-35, 36, size=4)
    modes = random.choice(["32T32R", "64T64R"], size=4)
    antennas = random.integers(1, 4, size=4)
    digital_azimuths = random.choice([0, 5, 10], size=count)
    digital_tilts = np.where(
        random.random(count) < 0.4, DIGITAL_TILT_DEFAULT, random.integers(0, 11, size=count)
    )
    mechanical_tilts = random.integers(2, 8, size=count)
    # Cells that never serve may be tilted steeply: a large tilt alone is no fault.
    steep = (random.random(count) < 0.25) & (np.arange(count) > SECOND)
    mechanical_tilts = np.where(steep, random.integers(20, 36, size=count), mechanical_tilts)
    scenarios = random.integers(0, len(BEAM_SCENARIOS), size=count)
    residues = random.choice(30, size=count, replace=False)
    if random.random() < 0.5:
        # The weakest kind of neighbour may share the residue: that harms nobody.
        residues[-1] = residues[SERVING]
    quotients = random.choice(33, size=count, replace=False)

    cells: list[Cell] = []
    sectors = [0] * 4
    for index, site in enumerate(sites):
        toward_road = np.degrees(directions[site]) + facing[site] + 120 * sectors[site]
        cells.append(
            Cell(
                gnodeb_id=f"00339{site_ids[site]:02d}",
                cell_id=sectors[site],
                east=road[0] - float(metres[site] * np.sin(directions[site])),
                north=road[1] - float(metres[site] * np.cos(directions[site])),
                mechanical_azimuth=round(float(toward_road) - digital_azimuths[index]) % 360,
                mechanical_downtilt=int(mechanical_tilts[index]),
                digital_tilt=int(digital_tilts[index]),
                digital_azimuth=int(digital_azimuths[index]),
                beam_scenario=BEAM_SCENARIOS[scenarios[index]],
                height=float(heights[site]),
                pci=int(30 * quotients[index] + residues[index]),
                txrx_mode=str(modes[site]),
                max_transmit_power=34.9,
                antenna_model=f"NR AAU {antennas[site]}",
            )
        )
        sectors[site] += 1
    return cells
