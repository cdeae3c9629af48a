r"""The compressed form of the synthetic TeleLogs task, for the tiny CPU policy.

This is not TeleLogs: a policy of 0.15 million parameters cannot read 2,500 tokens of tables. Nine
features are computed from the measurements (never from the injected cause), and each is put in
one of two or three bins that have a letter of their own: the user message is those nine letters,
the answer is `\boxed{C3}` as in the full task.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from data_prep.telelogs.simulator import DriveTest, serving_distance

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


def tiny_prompt(drive: DriveTest) -> str:
    """Return the nine letters of a drive, in the order of `FEATURES`."""
    return "".join(
        letters[bisect_right(edges, value)]
        for (edges, letters), value in zip(FEATURES, _values(drive), strict=True)
    )


def _values(drive: DriveTest) -> list[float]:
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
