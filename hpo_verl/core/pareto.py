"""The volume that points dominate."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, ...]


def dominated_volume(points: Sequence[Point], reference: Point) -> float:
    """Volume of what lies between the reference and a point; more is better in every coordinate.

    Exact, by slices along the first coordinate. A point that is not above the reference in every
    coordinate adds nothing.
    """
    above = {one for one in points if all(x > low for x, low in zip(one, reference, strict=True))}
    ordered = sorted(above, reverse=True)
    if not ordered:
        return 0.0
    first, *others = reference
    if not others:
        return ordered[0][0] - first
    ends = [*(one[0] for one in ordered[1:]), first]
    volume = 0.0
    for count, (start, end) in enumerate(zip(ordered, ends, strict=True), start=1):
        if start[0] > end:
            volume += (start[0] - end) * dominated_volume(
                [one[1:] for one in ordered[:count]], tuple(others)
            )
    return volume
