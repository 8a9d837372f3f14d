"""The hull that a file is compared with: nothing of the recipes lies below it, and it is never generous."""

import math
import random

import pytest

from benchmarks.quantizing.hull import Point, at, lower_hull


def test_no_recipe_lies_below_and_its_corners_are_recipes():
    draw = random.Random(1)
    for _ in range(200):
        points = [Point(draw.randrange(1, 50), math.exp(draw.uniform(-5, 0))) for _ in range(12)]
        corners = lower_hull(points)
        assert set(corners) <= set(points)
        for point in points:
            there = at(corners, point.size_bytes)
            assert there is not None
            assert there <= point.divergence * (1 + 1e-9)


def test_between_two_files_it_is_their_geometric_mean():
    corners = lower_hull([Point(80, 0.16), Point(100, 0.04)])
    assert at(corners, 90) == pytest.approx(0.08)


def test_a_larger_file_that_is_no_better_does_not_count():
    assert lower_hull([Point(80, 0.1), Point(90, 0.1), Point(100, 0.2)]) == [Point(80, 0.1)]


def test_a_file_above_the_line_between_others_does_not_count():
    assert lower_hull([Point(80, 0.16), Point(90, 0.12), Point(100, 0.04)]) == [
        Point(80, 0.16),
        Point(100, 0.04),
    ]


def test_below_the_smallest_there_is_nothing_to_compare_with_and_above_the_largest_its_own():
    corners = lower_hull([Point(80, 0.16), Point(100, 0.04)])
    assert at(corners, 79) is None
    assert at(corners, 200) == 0.04
    assert at([], 100) is None
