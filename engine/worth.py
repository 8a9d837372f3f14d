"""Who gives way where room is short: whatever is worth least, by last use and by what its loss would cost.

GreedyDual-Size (Cao and Irani, 1997): worth is the cost of a loss for the room that it makes, on top of what
the least worth was when it was last of use; so that what is dear outlives what is cheap, but not for ever.
Costs are asked for anew whenever somebody must go, since they change: what another one holds too costs
nothing, and much once that one is gone. Pure.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Worth(Generic[K]):
    """Remembers when each was of use last; what was never of use is worth no more than its cost."""

    def __init__(self) -> None:
        self._level = 0.0  # the most that anybody was worth who went
        self._n_uses = 0
        self._used: dict[K, tuple[float, int]] = {}  # the level at its last use, and which use that was

    def use(self, key: K) -> None:
        """It was of use, or is new."""
        self._n_uses += 1
        self._used[key] = self._level, self._n_uses

    def last_use(self, key: K) -> int:
        """Which of all uses its last one was; 0 for none."""
        return self._last(key)[1]

    def forget(self, key: K) -> None:
        """It is gone, or of no use any more."""
        self._used.pop(key, None)

    def least(self, keys: Iterable[K], rate: Callable[[K], float]) -> K | None:
        """Who goes; `rate`: the cost of its loss for the room that it makes. Of equals the longest unused."""
        worth = {key: (self._last(key)[0] + rate(key), self._last(key)[1]) for key in keys}
        if not worth:
            return None
        victim = min(worth, key=worth.__getitem__)
        self._level = max(self._level, worth[victim][0])
        return victim

    def _last(self, key: K) -> tuple[float, int]:
        return self._used.get(key, (0.0, 0))
