"""What stock recipes reach at any size: the lower convex hull of their (bytes, divergence) points.

Pure. The hull is taken over the logarithm of the divergence, in which sizes and divergences lie about on a
line; between two files that asks for less divergence than a straight line between them would.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Point(NamedTuple):
    """One file: its bytes and its mean divergence (> 0, nats)."""

    size_bytes: int
    divergence: float


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The corners, smallest file first; every point lies on or above the line through them."""
    corners: list[Point] = []
    for point in sorted(points):
        if corners and point.divergence >= corners[-1].divergence:
            continue  # larger and no better
        while len(corners) > 1 and _is_above(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def at(corners: Sequence[Point], size_bytes: int) -> float | None:
    """The hull's divergence at a size; None below its smallest file, the last corner's beyond its largest."""
    if not corners or size_bytes < corners[0].size_bytes:
        return None
    for left, right in pairwise(corners):
        if size_bytes <= right.size_bytes:
            return math.exp(_on_line(left, right, size_bytes))
    return corners[-1].divergence


def _is_above(left: Point, middle: Point, right: Point) -> bool:
    return math.log(middle.divergence) >= _on_line(left, right, middle.size_bytes)


def _on_line(left: Point, right: Point, size_bytes: int) -> float:
    """The logarithm of the divergence on the line between two corners."""
    share = (size_bytes - left.size_bytes) / (right.size_bytes - left.size_bytes)
    return (1 - share) * math.log(left.divergence) + share * math.log(right.divergence)
