"""Which tokens are guessed ahead: what the request's own words say, else what a draft model does.

Both have an account of their own (luck.py), and nothing is read or guessed that is not expected to pay: while
guesses do not pay, or many are writing, a draft model computes nothing at all.
"""

import time
from collections.abc import Mapping

from engine.drafter import Drafter
from engine.lookup import Lookup
from engine.luck import Luck
from engine.pace import Pace
from engine.sequence import Sequence

SPREAD = 64  # tokens yet to be written, at most, that must make up for reading what went before


class Guessing:
    """Guesses of one loop, and what came of them."""

    def __init__(self, pace: Pace, *, most: int, drafter: Drafter | None = None) -> None:
        """`most`: guesses of all sequences in one call; with more sequences than that there are none."""
        self.pace = pace
        self.most = most
        self.drafter = drafter
        self.quotes = Luck(pace)
        self.drafts = Luck(pace)
        self._lookups: dict[Sequence, Lookup] = {}
        self._source: Luck | None = None  # of the guesses in the running call
        self._made_s = 0.0  # what those took to make
        self._ahead: list[int] = []  # how many of them were right, by sequence

    @property
    def n_tried(self) -> int:
        return self.quotes.n_tried + self.drafts.n_tried

    @property
    def n_right(self) -> int:
        return self.quotes.n_right + self.drafts.n_right

    def choose(self, limits: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Tokens worth checking along with the next one of each.

        `limits`: how many, of all who write, in slot order.
        """
        self._source, self._made_s, self._ahead = None, 0.0, []
        if not 0 < len(limits) <= self.most:
            return {}
        found = {each: self._quoted(each, limit) for each, limit in limits.items() if limit}
        possible = {each: len(guesses) for each, guesses in found.items() if guesses}
        counts = self.quotes.worthwhile(possible, len(limits), most=self.most)
        if counts:
            self._source = self.quotes
            return {each: found[each][:count] for each, count in counts.items()}
        return {} if self.drafter is None else self._drafted(self.drafter, limits)

    def learn(self, sequence: Sequence, *, n_guesses: int, n_right: int) -> None:
        """Of a sequence's guesses in the running call the first `n_right` were."""
        if self._source is not None:
            self._source.learn(sequence, n_guesses=n_guesses, n_right=n_right)
            self._ahead.append(n_right)

    def called(self, n_writing: int, *, n_guesses: int, seconds: float) -> None:
        """The call is over, and held a token of so many sequences, guesses of theirs, and nothing else."""
        if n_guesses and self._source is not None:
            self._source.made(
                n_writing, n_guesses=n_guesses, ahead=self._ahead, seconds=seconds, made_s=self._made_s
            )
        elif not n_guesses:
            self.quotes.without(n_writing, seconds)
            self.drafts.without(n_writing, seconds)
            self.drafts.spent(self._made_s)
        self._made_s = 0.0

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended."""
        self._lookups.pop(sequence, None)
        self.quotes.forget(sequence)
        self.drafts.forget(sequence)

    def _quoted(self, sequence: Sequence, limit: int) -> list[int]:
        lookup = self._lookups.get(sequence)
        if lookup is None:
            lookup = self._lookups[sequence] = Lookup()
        return lookup.guess(sequence.tokens, limit)

    def _drafted(self, drafter: Drafter, limits: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Guesses of the draft model, for those where they pay though it may have to read first."""
        luck, n_writing = self.drafts, len(limits)
        possible, before_s = self._affordable(drafter, limits)
        counts = luck.worthwhile(
            possible, n_writing, most=self.most, depth_s=drafter.call_s, before_s=before_s
        )
        if not counts:
            return {}
        call_s = self.pace.guessing_s(n_writing, sum(counts.values()))
        started = time.perf_counter()
        ready = drafter.read(
            list(counts), within_s=self.pace.rest_s(call_s + max(counts.values()) * drafter.call_s)
        )
        was_read = time.perf_counter()
        luck.spent(was_read - started)
        if len(ready) < len(counts):
            possible = {each: counts[each] for each in ready}
            counts = luck.worthwhile(possible, n_writing, most=self.most, depth_s=drafter.call_s)
        guesses = drafter.guess(counts) if counts else {}
        self._made_s = time.perf_counter() - was_read
        self._source = luck if guesses else None
        return guesses

    def _affordable(
        self, drafter: Drafter, limits: Mapping[Sequence, int]
    ) -> tuple[dict[Sequence, int], dict[Sequence, float]]:
        """Sequences that may be read as far as they are, with their limits, and what that takes a token."""
        left_s = self.drafts.affords_s(len(limits))
        possible: dict[Sequence, int] = {}
        before_s: dict[Sequence, float] = {}
        for each, limit in limits.items():
            reading_s = drafter.n_missing(each) * drafter.token_s if limit else 0.0
            if limit and reading_s <= left_s:
                left_s -= reading_s
                possible[each], before_s[each] = limit, reading_s / min(SPREAD, each.n_behind_next)
        return possible, before_s
