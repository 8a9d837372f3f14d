"""Whose adapters the next call uses, and how many tokens of prompts it may hold.

Sequences with other LoRA adapters cannot be in one call, so the sets of adapters take turns, first the one
that was decoded longest ago. Who writes waits while others have theirs, and then for the prompts of its own
call. Of all those calls together the tokens of prompts are bounded by the limit of one call, whatever the
number of sets (of a single set it may be a fifth more, to spare a call: turns.py):
- It is divided among the sets that have prompts, MIN_PORTION at least for each.
- What a writing sequence has missed since it wrote last (Sequence.n_missed) counts against the limit. Where
  too little is left, prompts wait, those of a set that only has prompts with their turn.
- Then the set whose prompts had their turn longest ago is owed it: until it got that, nobody else's are
  computed. By then everybody has written, so all of the limit is there again: no prompt waits for ever.

Not bounded are those calls themselves. Each other set that writes has one of its own between two tokens of a
sequence, with a token of each that writes in it, and for each the adapters are changed: the more sets there
are, the longer everybody waits, prompts or not. Guesses are made in calls without prompts only, and count for
nothing here. Pure.
"""

from collections.abc import Hashable

from engine.sequence import Sequence

MIN_PORTION = 8  # tokens of a prompt worth a call


class Rotation:
    """Remembers when each set of adapters had its turn."""

    def __init__(self) -> None:
        self._turns: dict[Hashable, int] = {}
        self._read: dict[Hashable, int] = {}  # when prompts had theirs
        self._owed: set[Hashable] = set()  # one at most

    def next(self, running: list[Sequence]) -> Hashable:
        """Whose turn it is if nobody has a prompt to compute, or to wait with it."""
        return next(iter(self._in_order(running)), ())

    def group(self, running: list[Sequence], limit: int | None) -> list[Sequence]:
        """Those of the next call; `limit`: tokens of prompts between two of a writing sequence's, or None."""
        sets = self._in_order(running)
        if len(sets) <= 1:
            for memory in (self._turns, self._read, self._owed):
                memory.clear()
            return running
        reading = _reading(running)
        self._owed &= reading
        newest = self._newest
        for chosen in sets:
            waits = chosen in reading and self.portion(chosen, running, limit) == 0
            if waits and not self._owed:
                self._owed.add(min(reading, key=lambda each: self._read.get(each, newest)))
            if not waits or any(each.is_writing for each in running if each.adapters == chosen):
                break
        else:
            raise AssertionError("whoever makes prompts wait can write")
        self._turns = {each: self._turns.get(each, newest) for each in sets} | {chosen: newest + 1}
        self._read = {each: self._read.get(each, newest) for each in reading}
        if chosen in reading and not waits:
            self._read[chosen] = newest + 1
            self._owed.discard(chosen)
        return [each for each in running if each.adapters == chosen]

    def portion(self, adapters: Hashable, running: list[Sequence], limit: int | None) -> int | None:
        """Tokens of prompts that a call of this set may hold; 0: they wait."""
        if limit is None:
            return None
        left = limit - max((each.n_missed for each in running if each.is_writing), default=0)
        share = max(MIN_PORTION, limit // max(1, len(_reading(running))))
        if left < min(MIN_PORTION, limit) or self._owed - {adapters}:
            return 0
        return min(left, share)

    def _in_order(self, running: list[Sequence]) -> list[Hashable]:
        """Sets of adapters, the one whose turn was longest ago first."""
        newest = self._newest  # who comes, or comes back, is behind those that wait
        sets = dict.fromkeys(each.adapters for each in running)
        return sorted(sets, key=lambda adapters: self._turns.get(adapters, newest))

    @property
    def _newest(self) -> int:
        return max(self._turns.values(), default=0)


def _reading(running: list[Sequence]) -> set[Hashable]:
    """Sets of adapters with prompts that can be computed now."""
    return {each.adapters for each in running if not each.is_writing and not each.leader}
