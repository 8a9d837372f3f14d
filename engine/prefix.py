"""Which cached tokens serve these tokens. Pure: token tuples in, lengths out.

Every slot remembers the tokens whose cells it holds, running or idle. A new sequence goes on in the slot that
has the longest common prefix, or copies those cells into its own; whether that is worth it is the scheduler's
to say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """The slot that holds the longest common prefix, and how many tokens that is."""

    slot: int
    length: int


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share; compares by doubling slices, so in C."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


def longest_match(tokens: Sequence[int], held: Mapping[int, Sequence[int]]) -> Match | None:
    """The best of the slots for these tokens; None when no slot shares even the first one."""
    best: Match | None = None
    for slot, cached in held.items():
        length = common_prefix(tokens, cached)
        if length and (best is None or length > best.length):
            best = Match(slot, length)
    return best
