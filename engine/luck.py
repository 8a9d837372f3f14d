"""How far guesses can be trusted, and whether they are worth their time: never slower than without them.

What a guess that comes true saves: a sequence that is ahead leaves its part of a later call to others. What a
call takes by itself, however many are in it, is saved only when all who write are ahead.

Estimates may be wrong, so there is an account besides. What guesses took longer than they saved is a debt. It
is paid off by what others save, and by a small part of the time of all calls without guesses; a guess that
could bring the debt over the loan is not made. So whatever calls cost and whatever comes true, all guesses
together lose no more than the loan and that part of the time. Pure.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from engine.pace import FORGETTING, Pace

K = TypeVar("K", bound=Hashable)

WORTH = 1.03  # guesses must promise this much more to be tried
GUESSES_A_SEQUENCE = 8  # in one call, at most
TRUST_EVENTS = 4.0  # guesses that the common experience counts for, against a sequence's own
MIN_CHANCE = 0.05  # that a guess is right: less likely ones are not even reckoned with
LOAN = 2.0  # calls without guesses: the debt that may be made before anything is known
READ_LOAN = 4.0  # the same, for reading what guesses are made from
RISK = 0.005  # of the time of calls without guesses, for tries
CREDIT = 64.0  # calls: what was saved and is not yet spent on reading prompts
IN_A_ROW = 32  # calls with guesses, before one without says what those take now


@dataclass(slots=True)
class _Record:
    """How often guesses for one sequence were right."""

    tried: float = 0.0
    right: float = 0.0


HOPE = _Record(2.0, 1.0)  # before anything is known


@dataclass(slots=True)
class Luck:
    """Of guesses of one kind: sequence by sequence, and how many are worth their time."""

    pace: Pace
    n_tried: int = 0
    n_right: int = 0
    debt_s: float = 0.0
    saved_s: float = 0.0  # and not spent; below 0 for what was lent before anything was saved
    _common: _Record = field(default_factory=lambda: replace(HOPE))
    _own: dict[Hashable, _Record] = field(default_factory=dict)

    def learn(self, key: Hashable, *, n_guesses: int, n_right: int) -> None:
        """Of a sequence's guesses the first `n_right` were; those behind the first wrong one say nothing."""
        self.n_tried += n_guesses
        self.n_right += n_right
        n_tried = min(n_guesses, n_right + 1)
        for record in (self._own.setdefault(key, _Record()), self._common):
            record.tried = 0.9 * record.tried + n_tried
            record.right = 0.9 * record.right + n_right

    def forget(self, key: Hashable) -> None:
        """The sequence ended."""
        self._own.pop(key, None)

    def chance(self, key: Hashable) -> float:
        """That the next guess is right, given that those before it were."""
        common = self._common.right / max(1.0, self._common.tried)
        own = self._own.get(key, _Record())
        return (own.right + TRUST_EVENTS * common) / (own.tried + TRUST_EVENTS)

    # The account

    def without(self, n_writing: int, seconds: float) -> None:
        """A call without guesses took so long: a small part of it is for tries."""
        self.debt_s = max(0.0, self.debt_s - RISK * seconds)
        self._save(RISK * seconds, n_writing)

    def made(
        self, n_writing: int, *, n_guesses: int, ahead: Collection[int], seconds: float, made_s: float = 0.0
    ) -> None:
        """A call with guesses took so long, and making them `made_s`; `ahead`: how many were right, of each
        sequence that had any."""
        base_s = self.pace.writing_s(n_writing)
        # A call that took longer than each guess by itself was stopped by something else.
        extra_s = min(seconds - base_s, 2 * n_guesses * self.pace.writing_s(1))
        balance_s = self._worth_s(n_writing, ahead) - extra_s - made_s - self.debt_s
        self.debt_s = max(0.0, -balance_s)
        self._save(max(0.0, balance_s), n_writing)

    def affords_s(self, n_writing: int) -> float:
        """Seconds that may be spent on reading what guesses are made from."""
        return self.saved_s + READ_LOAN * self.pace.writing_s(n_writing)

    def spent(self, seconds: float) -> None:
        """That was spent on reading."""
        self.saved_s -= seconds

    def _save(self, seconds: float, n_writing: int) -> None:
        self.saved_s = min(self.saved_s + seconds, CREDIT * self.pace.writing_s(n_writing))

    def _worth_s(self, n_writing: int, ahead: Collection[float]) -> float:
        """What later calls take less if these sequences, and no others, are so many tokens ahead."""
        by_itself_s, each_s = self.pace.shares_s(n_writing)
        of_all = min(ahead) if len(ahead) == n_writing else 0.0
        return each_s * sum(ahead) + by_itself_s * of_all

    # The choice

    def worthwhile(
        self,
        guesses: Mapping[K, int],
        n_writing: int,
        *,
        most: int | None = None,
        depth_s: float = 0.0,
        before_s: Mapping[K, float] | None = None,
    ) -> dict[K, int]:
        """How many of each sequence's guesses save most time in the next call.

        `guesses`: how many there are; `most`: of all together. `depth_s`: what the first, the second ... of
        all of them takes to make; `before_s`: what else those of a sequence take. More sequences than `most`
        are a load under which no guesses are made.
        """
        if not guesses or (most is not None and n_writing > most):
            return {}
        for key in guesses:
            if (own := self._own.get(key)) is not None:
                own.tried *= 1 - FORGETTING
                own.right *= 1 - FORGETTING
        if self.pace.n_guessing >= IN_A_ROW:
            return {}
        chances = {key: self.chance(key) for key in guesses}
        base_s, best, best_rate = self.pace.writing_s(n_writing), {}, WORTH
        for counts in _candidates(guesses, chances, n_writing, most):
            n_guesses = sum(counts.values())
            even = len(counts) == n_writing and len(set(counts.values())) == 1
            seconds = self.pace.guessing_s(n_writing, n_guesses, even=even) + depth_s * max(counts.values())
            if self.debt_s + seconds - base_s > LOAN * base_s:
                continue
            seconds += sum((before_s or {}).get(key, 0.0) for key in counts)
            worth_s = self._worth_s(n_writing, [_expected(chances[key], n) for key, n in counts.items()])
            rate = (base_s + worth_s) / max(1e-9, seconds)
            if rate > best_rate:
                best, best_rate = counts, rate
        if not best:  # neither bad luck nor a slow call is believed for ever
            self.pace.doubt(n_writing)
            self._common.tried += FORGETTING * (HOPE.tried - self._common.tried)
            self._common.right += FORGETTING * (HOPE.right - self._common.right)
        return best


def _candidates(
    guesses: Mapping[K, int], chances: Mapping[K, float], n_writing: int, most: int | None
) -> Iterator[dict[K, int]]:
    """Ways to choose: the same number for all, and the likeliest guesses, one after another."""
    if 1 < len(guesses) == n_writing:
        least = min(guesses.values())
        for count in range(1, (least if most is None else min(least, most // n_writing)) + 1):
            yield dict.fromkeys(guesses, count)
    places = [
        (chance, key)
        for key, count in guesses.items()
        for place in range(1, count + 1)
        if (chance := chances[key] ** place) >= MIN_CHANCE
    ]
    places.sort(key=lambda place: -place[0])
    counts: dict[K, int] = {}
    for _, key in places[:most]:
        counts[key] = counts.get(key, 0) + 1
        yield dict(counts)


def _expected(chance: float, count: int) -> float:
    """Of so many guesses in a row, how many come true before the first that does not."""
    return count * chance if chance > 0.999 else chance * (1 - chance**count) / (1 - chance)
