"""Who holds which cells of a unified KV memory, and so how many are free.

In a unified memory sequences share the cells of a common prefix; a cell is free once nobody holds it.
llama.cpp does not tell how many are in use, so this keeps count of its operations: append, copy a prefix,
cut. Pure.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Run:
    """Cells of consecutive positions, held by the same sequences."""

    length: int
    holders: set[int] = field(default_factory=set)


class Cells:
    """Runs by sequence, in order of positions."""

    def __init__(self, n_total: int, n_sequences: int) -> None:
        self.n_total = n_total
        self.n_used = 0
        self._runs: list[list[Run]] = [[] for _ in range(n_sequences)]

    @property
    def n_free(self) -> int:
        return self.n_total - self.n_used

    def append(self, sequence: int, count: int) -> None:
        """A sequence computed more tokens."""
        runs = self._runs[sequence]
        if runs and runs[-1].holders == {sequence}:
            runs[-1].length += count
        elif count:
            runs.append(Run(count, {sequence}))
        self.n_used += count

    def share(self, source: int, target: int, length: int) -> None:
        """`target` drops what it has and holds the first `length` cells of `source` too."""
        self.cut(target, 0)
        at = 0
        for run in self._split(source, length):
            if at >= length:
                break
            run.holders.add(target)
            self._runs[target].append(run)
            at += run.length

    def cut(self, sequence: int, length: int) -> None:
        """A sequence keeps its first `length` cells only."""
        at = 0
        kept: list[Run] = []
        for run in self._split(sequence, length):
            if at < length:
                kept.append(run)
            else:
                run.holders.discard(sequence)
                self.n_used -= 0 if run.holders else run.length
            at += run.length
        self._runs[sequence] = kept

    def n_held(self, sequence: int) -> int:
        """Cells of one sequence."""
        return sum(run.length for run in self._runs[sequence])

    def n_alone(self, sequences: Iterable[int]) -> int:
        """Cells that nobody else holds: would be free if all of these gave up their own."""
        own = set(sequences)
        return sum({run: run.length for at in own for run in self._runs[at] if run.holders <= own}.values())

    @property
    def n_shared(self) -> int:
        """Cells that more than one sequence holds."""
        shared = {id(run): run.length for runs in self._runs for run in runs if len(run.holders) > 1}
        return sum(shared.values())

    def _split(self, sequence: int, length: int) -> list[Run]:
        """Make a boundary at `length`, for every holder; the sequence's runs, a copy of the list."""
        at = 0
        for run in self._runs[sequence]:
            if at < length < at + run.length:
                rest = Run(at + run.length - length, set(run.holders))
                run.length = length - at
                for holder in run.holders:
                    runs = self._runs[holder]
                    runs.insert(runs.index(run) + 1, rest)
                break
            at += run.length
        return list(self._runs[sequence])
