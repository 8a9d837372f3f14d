"""Longest common prefixes between a prompt and what the slots hold."""

import random

import pytest

from engine.prefix import Match, common_prefix, longest_match


@pytest.mark.parametrize(
    ("left", "right", "length"),
    [
        ((), (), 0),
        ((), (1,), 0),
        ((1,), (2,), 0),
        ((1,), (1,), 1),
        ((1, 2, 3), (1, 2), 2),
        ((1, 2, 3), (1, 2, 4), 2),
        ((1, 2, 3, 4, 5, 6, 7), (1, 9, 3, 4, 5, 6, 7), 1),
    ],
)
def test_common_prefix_counts_equal_leading_tokens(left, right, length):
    assert common_prefix(left, right) == length


def test_common_prefix_equals_the_plain_count_on_random_pairs():
    chance = random.Random(1)
    for _ in range(2000):
        left = tuple(chance.randrange(2) for _ in range(chance.randrange(12)))
        right = tuple(chance.randrange(2) for _ in range(chance.randrange(12)))
        expected = 0
        while expected < min(len(left), len(right)) and left[expected] == right[expected]:
            expected += 1
        assert common_prefix(left, right) == expected


def test_the_longest_match_wins_and_the_first_slot_among_equals():
    held = {0: (1, 2), 1: (1, 2, 3), 2: (1, 2, 3, 9), 3: ()}
    assert longest_match((1, 2, 3, 4), held) == Match(slot=1, length=3)


def test_nothing_in_common_is_no_match():
    assert longest_match((5, 6), {0: (1, 2), 1: ()}) is None
    assert longest_match((), {0: (1, 2)}) is None
