"""Which saved states stay, in host memory and on disk, each within its budget of bytes.

A state is what a slot held when somebody else needed the slot, or a running sequence that had to make way.
Full memory first moves its least worthy state to disk, if there is a disk budget; a full disk throws its own
away. Worth (worth.py) is the cost to compute a state's tokens again, a byte; what others hold too costs
nothing, and is not worth a place on disk. Pure.
"""

from collections.abc import Callable, Hashable, KeysView
from dataclasses import dataclass
from typing import Literal

from engine.worth import Worth

MIN_SAVED = 64  # tokens that are worth saving

Tier = Literal["ram", "disk"]


@dataclass(eq=False, slots=True)
class State:
    """Computed tokens outside of the KV memory."""

    tokens: list[int]
    namespace: Hashable
    size_bytes: int
    tier: Tier = "ram"
    copied: bool = False  # is in memory, and on disk for the case of a crash
    pinned: bool = False  # belongs to a sequence that goes on from it

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Where its bytes are."""
        return ("ram", "disk") if self.copied else (self.tier,)


@dataclass(frozen=True, slots=True)
class Copy:
    """Write a state's bytes to disk; memory keeps them, too."""

    state: State


@dataclass(frozen=True, slots=True)
class Demote:
    """Move a state's bytes from memory to disk, or forget those in memory when disk has them already."""

    state: State


@dataclass(frozen=True, slots=True)
class Discard:
    """Throw a state's bytes away."""

    state: State


class Stash:
    """The states and their bytes.

    `cost` tells how many tokens would have to be computed again if a state were lost: from memory now, from
    disk after a crash. `forget` is told of those that are thrown away, before the next cost is asked for.
    """

    def __init__(
        self,
        *,
        ram_bytes: int,
        disk_bytes: int = 0,
        cost: Callable[[State, Tier], int],
        forget: Callable[[State], object],
    ) -> None:
        self.budgets: dict[Tier, int] = {"ram": ram_bytes, "disk": disk_bytes}
        self.used: dict[Tier, int] = {"ram": 0, "disk": 0}
        self._states: dict[State, None] = {}
        self._cost = cost
        self._forget = forget
        self._worth: dict[Tier, Worth[State]] = {"ram": Worth(), "disk": Worth()}

    @property
    def states(self) -> KeysView[State]:
        """All that are kept."""
        return self._states.keys()

    def fits(self, size_bytes: int, *, pinned: bool = False) -> bool:
        """Whether a state of this size could be kept after others gave way: pinned ones do not.

        What is too large for memory goes on to disk at once, unless it is to be pinned.
        """
        taken = sum(state.size_bytes for state in self.states if state.pinned and state.tier == "ram")
        if size_bytes <= self.budgets["ram"] - taken:
            return True
        return not pinned and self.budgets["ram"] < size_bytes <= self.budgets["disk"]

    def add(self, state: State) -> list[Demote | Discard]:
        """Keep a state; what has to go for it, perhaps itself."""
        self._states[state] = None
        self.used[state.tier] += state.size_bytes
        self.touch(state)
        return self._shrink()

    def copy(self) -> list[Copy | Demote | Discard]:
        """Have the dearest state that only memory has on disk, too; what has to go for it. None: nothing.

        Copies push out what disk alone has, and never each other.
        """
        copied = sum(state.size_bytes for state in self.states if state.copied)
        room = self.budgets["disk"] - copied
        wanted = {
            each: self._cost(each, "disk")
            for each in self._of("ram")
            if not each.copied and each.size_bytes <= room
        }
        state = max(wanted, key=wanted.__getitem__, default=None)
        if state is None or not wanted[state]:
            return []
        state.copied = True
        self.used["disk"] += state.size_bytes
        return [*self._shrink(), Copy(state)]

    def touch(self, state: State) -> None:
        """A state was of use."""
        self._worth[state.tier].use(state)

    def remove(self, state: State) -> None:
        """Its bytes are gone, or about to be."""
        del self._states[state]
        self._worth[state.tier].forget(state)
        for tier in state.tiers:
            self.used[tier] -= state.size_bytes
        self._forget(state)

    def empty(self, tier: Tier) -> list[Demote | Discard]:
        """Give up a tier; its states go where they would for lack of room."""
        for state in self.states:
            state.pinned = False
        self.budgets[tier] = 0
        return self._shrink()

    def _shrink(self) -> list[Demote | Discard]:
        gone: list[Demote | Discard] = []
        while (victim := self._victim("ram")) is not None:
            if victim.copied or self._belongs_on_disk(victim):
                self._demote(victim)
                gone.append(Demote(victim))
            else:
                self.remove(victim)
                gone.append(Discard(victim))
        while (victim := self._victim("disk")) is not None:
            self.remove(victim)
            gone.append(Discard(victim))
        return gone

    def _belongs_on_disk(self, state: State) -> bool:
        """Whether it fits there, and holds enough that nobody else does."""
        return state.size_bytes <= self.budgets["disk"] and self._cost(state, "ram") >= MIN_SAVED

    def _demote(self, state: State) -> None:
        self._worth["ram"].forget(state)
        self.used["ram"] -= state.size_bytes
        self.used["disk"] += 0 if state.copied else state.size_bytes
        state.tier, state.copied = "disk", False
        self.touch(state)

    def _victim(self, tier: Tier) -> State | None:
        """The least worthy state of a tier that is over its budget, or one that never fits."""
        budget = self.budgets[tier]
        if self.used[tier] <= budget:
            return None
        candidates = self._of(tier)
        too_large = [state for state in candidates if state.size_bytes > budget]
        return self._worth[tier].least(too_large or candidates, self._rate)

    def _of(self, tier: Tier) -> list[State]:
        return [state for state in self.states if state.tier == tier and not state.pinned]

    def _rate(self, state: State) -> float:
        return self._cost(state, state.tier) / max(1, state.size_bytes)
