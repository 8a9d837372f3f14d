"""Does in native memory what the scheduler decided: cells are shared, saved, restored, adapters applied."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from engine.llama import Adapter, Context
from engine.sequence import Action, Begin, Drop, Save
from engine.stash import Copy, Demote, Discard, State
from engine.states import States

Scaled = tuple[Adapter, float]


class Hands:
    """Owns what the context's memory holds, the bytes of saved states, and which adapters are applied."""

    def __init__(
        self,
        context: Context,
        states: States,
        *,
        applied: Sequence[Scaled] = (),
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        """`applied`: adapters that every call uses; `adapters`: those that a request may name."""
        self.context = context
        self.states = states
        self.adapters = dict(adapters or {})
        self._applied = list(applied)
        self._in_use: Hashable = ()

    def act(self, actions: Iterable[Action]) -> list[Begin | State]:
        """Do these in order; those that did not bring all that a sequence should begin with, and states
        that could not be written to disk."""
        failed: list[Begin | State] = []
        saved: tuple[int, np.ndarray] | None = None  # what was last read of a slot, for several who copy it
        for action in actions:
            match action:
                case Begin(_, slot, source, length):
                    if isinstance(source, int) and source != slot and not self.context.unified:
                        if saved is None or saved[0] != source:
                            saved = source, self.context.save(source)
                        self._bring(slot, saved[1], length)
                    else:
                        self._begin(slot, source, length)
                    if saved is not None and saved[0] == slot:
                        saved = None
                    if self.context.length(slot) != length:  # a damaged file, say
                        self.context.remove(slot)
                        failed.append(action)
                case Save(slot, state):
                    self.states.keep(state, self.context.save(slot))
                case Drop(slot):
                    self.context.remove(slot)
                    saved = None if saved is not None and saved[0] == slot else saved
                case Copy() | Demote() | Discard():
                    failed += self._stow(action)
        return failed

    def _stow(self, action: Copy | Demote | Discard) -> list[State]:
        """Put away or throw away a state's bytes; the state, if they are lost by that."""
        match action:
            case Copy(state):
                self.states.copy(state)
            case Demote(state):
                return [] if self.states.demote(state) else [state]
            case Discard(state):
                self.states.discard(state)
        return []

    def use(self, adapters: Hashable) -> None:
        """Apply the adapters of the next call's sequences: (name, scale) each."""
        if adapters == self._in_use:
            return
        assert isinstance(adapters, tuple)
        self.context.apply([*self._applied, *((self.adapters[name], scale) for name, scale in adapters)])
        self._in_use = adapters

    def _begin(self, slot: int, source: int | State | None, length: int) -> None:
        if isinstance(source, State):
            self._bring(slot, self.states.read(source), length)
        elif source is None:
            self.context.remove(slot)
        elif source == slot:
            self.context.remove(slot, length)
        else:
            self.context.share(source, slot, length)

    def _bring(self, slot: int, data: np.ndarray | None, length: int) -> None:
        """Restore a slot from bytes, if there are any and llama.cpp can."""
        if data is None:
            self.context.remove(slot)
        elif self.context.restore(slot, data):
            self.context.remove(slot, length)
