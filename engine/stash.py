"""Which saved states stay, in host memory and on disk, each within its budget of bytes.

A state is what a slot held when somebody else needed the slot, or a running sequence that had to make way.
Full memory first moves its least worthy state to disk, if there is a disk budget; a full disk throws its own
away. Worth follows GreedyDual-Size (Cao and Irani, 1997): the cost to recompute a state, a byte, on top of
what was the least worth when it was last used; so that costly states outlive cheap ones, but not for ever.
Pure.
"""

from collections.abc import Callable, Hashable, Iterable, KeysView
from dataclasses import dataclass
from typing import Literal

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
    worth: float = 0.0

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
    """The states and their bytes; `n_alone` tells how many tokens of a state nobody else holds."""

    def __init__(self, *, ram_bytes: int, disk_bytes: int = 0, n_alone: Callable[[State], int]) -> None:
        self.budgets: dict[Tier, int] = {"ram": ram_bytes, "disk": disk_bytes}
        self.used: dict[Tier, int] = {"ram": 0, "disk": 0}
        self._states: dict[State, None] = {}  # the longest unused first
        self._n_alone = n_alone
        self._inflation: dict[Tier, float] = {"ram": 0.0, "disk": 0.0}

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

    def add(self, state: State, *, cost: int | None = None) -> list[Demote | Discard]:
        """Keep a state; what has to go for it, perhaps itself. `cost`: of it in tokens, if not `n_alone`."""
        self._states[state] = None
        self.used[state.tier] += state.size_bytes
        self.touch(state, cost=cost)
        return self._shrink()

    def copy(self) -> list[Copy | Demote | Discard]:
        """Have the worthiest state that only memory has on disk, too; what has to go for it. None: nothing.

        Copies push out what disk alone has, and never each other.
        """
        copied = sum(state.size_bytes for state in self.states if state.copied)
        room = self.budgets["disk"] - copied
        wanted = [each for each in self._of("ram") if not each.copied and each.size_bytes <= room]
        if not wanted:
            return []
        state = max(wanted, key=lambda each: each.worth)
        state.copied = True
        self.used["disk"] += state.size_bytes
        return [*self._shrink(), Copy(state)]

    def touch(self, state: State, *, cost: int | None = None) -> None:
        """A state was of use."""
        cost = max(1, self._n_alone(state) if cost is None else cost)
        self._states[state] = self._states.pop(state, None)  # now the latest
        state.worth = self._inflation[state.tier] + cost / max(1, state.size_bytes)

    def remove(self, state: State) -> None:
        """Its bytes are gone, or about to be."""
        del self._states[state]
        for tier in state.tiers:
            self.used[tier] -= state.size_bytes

    def empty(self, tier: Tier) -> list[Demote | Discard]:
        """Give up a tier; its states go where they would for lack of room."""
        for state in self.states:
            state.pinned = False
        self.budgets[tier] = 0
        return self._shrink()

    def _shrink(self) -> list[Demote | Discard]:
        gone: list[Demote | Discard] = []
        while (victim := self._victim("ram")) is not None:
            if victim.size_bytes <= self.budgets["disk"] and not victim.pinned:
                self.used["ram"] -= victim.size_bytes
                self.used["disk"] += 0 if victim.copied else victim.size_bytes
                victim.tier, victim.copied = "disk", False
                self.touch(victim)
                gone.append(Demote(victim))
            else:
                self.remove(victim)
                gone.append(Discard(victim))
        while (victim := self._victim("disk")) is not None:
            self.remove(victim)
            gone.append(Discard(victim))
        return gone

    def _victim(self, tier: Tier) -> State | None:
        """The least worthy state of a tier that is over its budget, or one that never fits."""
        if self.used[tier] <= self.budgets[tier]:
            return None
        budget = self.budgets[tier]
        victim = min(self._of(tier), key=lambda each: (each.size_bytes <= budget, each.worth), default=None)
        if victim is not None:
            self._inflation[tier] = victim.worth
        return victim

    def _of(self, tier: Tier) -> Iterable[State]:
        return (state for state in self.states if state.tier == tier and not state.pinned)
