"""Who holds which computed tokens: the slots of the KV memory, and states saved outside of it.

Keeps the prefix tree, the count of cells and the stash in step with one another, and says what has to be done
in native memory for it, as actions. It decides what is kept and what gives way; who runs is scheduler.py's.
Pure.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from engine.cells import Cells
from engine.prefix import PrefixTree
from engine.sequence import Action, Begin, Drop, Save, Sequence, Slot
from engine.stash import MIN_SAVED, Demote, Discard, Stash, State, Tier
from engine.worth import Worth

Source = int | State | None  # a slot, a saved state, or nobody


@dataclass(frozen=True, slots=True)
class Costs:
    """What it takes to bring a prefix, in tokens that could be computed meanwhile."""

    copy: int = 0  # from another slot
    copied: float = 0.0  # each token that the other slot holds: all of it is saved and restored
    restore: int = 16  # from host memory
    load: int = 64  # from disk


class Holdings:
    """Slots, what they hold, and what was saved of them."""

    def __init__(
        self,
        *,
        n_slots: int,
        n_cells: int | None,
        share_prefixes: bool,
        n_window: int,
        costs: Costs,
        ram_bytes: int,
        disk_bytes: int,
        token_bytes: int,
    ) -> None:
        """The arguments are the Scheduler's."""
        self.share_prefixes = share_prefixes
        self.n_window = n_window
        self.costs = costs
        self.token_bytes = token_bytes
        self.slots = [Slot() for _ in range(n_slots)]
        self.cells = None if n_cells is None else Cells(n_cells, n_slots)
        self.tree = PrefixTree()
        self.stash = Stash(
            ram_bytes=ram_bytes, disk_bytes=disk_bytes, cost=self._cost, forget=self.tree.release
        )
        self._worth: Worth[int] = Worth()  # of slots
        self._n_taken = 0

    @property
    def busy(self) -> list[int]:
        """Slots of running sequences, in order."""
        return [index for index, slot in enumerate(self.slots) if slot.sequence is not None]

    def adopt(self, states: Iterable[State]) -> list[Action]:
        """Know states that an earlier process left on disk."""
        actions: list[Action] = []
        for state in states:
            self.tree.hold(state, state.tokens, state.namespace)
            actions += self.stash.add(state)
        return actions

    def retire(self) -> list[Action]:
        """Move to disk what is in slots and in memory, as far as the budgets let."""
        actions: list[Action] = []
        if not self.stash.budgets["disk"]:
            return actions
        idle = self._idle(None)
        while (index := self._worth.least(idle, self._rate)) is not None:
            idle.discard(index)
            self._rescue(index, actions)
            self.drop(index, actions)  # what two slots share is the second one's alone then
        actions += self.stash.empty("ram")
        return actions

    def back_up(self) -> list[Action]:
        """Have on disk one state that only memory has, or an idle slot; nothing if all is there."""
        actions: list[Action] = list(self.stash.copy())
        for index in sorted(self._idle(None), key=self._worth.last_use, reverse=True):
            if actions:
                break
            self._back_up_slot(index, actions)
        return actions

    def _back_up_slot(self, index: int, actions: list[Action]) -> None:
        """Once after each use, and if much is new: a conversation is not written again for every sentence."""
        slot, last_use = self.slots[index], self._worth.last_use(index)
        if slot.backed_up == last_use or not self.share_prefixes:
            return
        slot.backed_up = last_use
        if self._n_beyond(index, _is_on_disk) < max(MIN_SAVED, len(slot.tokens) // 4):
            return
        held = [
            (match.length, each)
            for match in self.tree.matches(slot.tokens, slot.namespace)
            for each in match.holders
            if isinstance(each, State)
        ]
        state = State(list(slot.tokens), slot.namespace, self._size_bytes(index), tier="disk")
        self.tree.hold(state, state.tokens, state.namespace)
        gone = self.stash.add(state)
        actions += [each for each in gone if each != Discard(state)]
        if state not in self.stash.states:
            return
        actions += [Save(index, state), Demote(state)]
        for length, each in held:
            # All that it has is in the new one, which can be cut to it unless there is a window.
            if each.tier == "disk" and each.length == length and not self.n_window:
                self.discard(each, actions)

    def append(self, index: int, tokens: list[int], namespace: Hashable) -> None:
        """A slot's sequence computed more tokens."""
        self.slots[index].tokens.extend(tokens)
        self.tree.extend(index, tokens, namespace)
        if self.cells is not None:
            self.cells.append(index, len(tokens))

    def source(self, sequence: Sequence) -> tuple[Source, int]:
        """Who brings how many of the first tokens, but for the last: its logits are needed."""
        best: tuple[Source, int] = (None, 0)
        gain = 0
        if not self.share_prefixes:
            return best
        for match in self.tree.matches(sequence.tokens[:-1], sequence.namespace):
            if match.length <= gain:
                break
            for holder in match.holders:
                assert isinstance(holder, int | State)
                can_come = holder is sequence.state or self._can_come(holder)
                if can_come and self._can_bring(holder, match.length, sequence):
                    value = match.length - self.cost(holder, match.length)
                    if value > gain or (value == gain and value and isinstance(holder, int)):
                        best, gain = (holder, match.length), value
        return best

    def cost(self, holder: int | State, length: int) -> int:
        """Of bringing so many tokens from there, in tokens."""
        if isinstance(holder, State):
            return self.costs.restore if holder.tier == "ram" else self.costs.load
        n_held = len(self.slots[holder].tokens)
        if self.slots[holder].sequence is None and self._is_taken(holder, length):
            return 0 if 2 * length >= n_held else self._n_lost_more(holder, length)
        return self.costs.copy + int(self.costs.copied * n_held)

    def begin(self, sequence: Sequence, source: Source, length: int, actions: list[Action]) -> None:
        """Let a sequence's slot hold what it is given, and nothing else."""
        index = sequence.slot
        assert index is not None
        slot = self.slots[index]
        slot.tokens, slot.namespace = sequence.tokens[:length], sequence.namespace
        if source != index:
            slot.n_brought = length if length >= self.n_window else 0
        if isinstance(source, State):
            self.stash.touch(source)
        elif source is not None and source != index:
            self._worth.use(source)
        if self.cells is not None:
            if source == index:
                self.cells.cut(index, length)
            elif isinstance(source, int):
                self.cells.share(source, index, length)
            else:
                self.cells.cut(index, 0)
                self.cells.append(index, length)
        self.tree.hold(index, slot.tokens, sequence.namespace)
        actions.append(Begin(sequence, index, source, length))

    def take(self, sequence: Sequence, source: Source, length: int, actions: list[Action]) -> None:
        """Give an idle slot to a sequence; what only that slot held is saved if it is much."""
        free = [index for index, slot in enumerate(self.slots) if slot.sequence is None]
        target = self._target(free, source, length)
        self._rescue(target, actions, n_kept=length if target == source else 0)
        self._worth.use(target)
        self.slots[target].sequence = sequence
        self._n_taken += 1
        sequence.slot, sequence.age = target, self._n_taken
        self.begin(sequence, source, length, actions)

    def leave(self, index: int, *, saved: bool = False) -> None:
        """A slot's sequence goes; what it holds stays until somebody else needs it, if `saved` the first."""
        self.slots[index].sequence = None
        if saved:
            self._worth.forget(index)
        else:
            self._worth.use(index)

    def move(self, sequence: Sequence, target: int, actions: list[Action]) -> None:
        """Give a running sequence an idle slot instead of its own, with all that it has computed."""
        source = sequence.slot
        assert source is not None
        self._rescue(target, actions)
        self.slots[target].sequence, self.slots[source].sequence = sequence, None
        sequence.slot = target
        self.begin(sequence, source, sequence.n_computed, actions)
        self.drop(source, actions)

    def save(
        self, index: int, actions: list[Action], *, pinned: bool = False, n_kept: int | None = None
    ) -> State | None:
        """Copy a slot's tokens to a state, if the stash can take it.

        `n_kept`: how many of them the slot will hold when this is done; None: all. The others are the state's
        alone, which counts when it is decided who makes way for it.
        """
        slot = self.slots[index]
        size = self._size_bytes(index)
        if not self.share_prefixes or not self.stash.fits(size, pinned=pinned):
            return None
        state = State(list(slot.tokens), slot.namespace, size, pinned=pinned)
        self.tree.hold(state, state.tokens, state.namespace)
        if n_kept is not None:
            self.tree.hold(index, slot.tokens[:n_kept], slot.namespace)
        actions.append(Save(index, state))
        actions += self.stash.add(state)
        return state

    def discard(self, state: State, actions: list[Action]) -> None:
        """A state is of no use any more."""
        if state in self.stash.states:
            self.stash.remove(state)
            actions.append(Discard(state))

    def drop(self, index: int, actions: list[Action]) -> None:
        """Forget what a slot holds."""
        self.slots[index].tokens, self.slots[index].n_brought = [], 0
        self.tree.release(index)
        if self.cells is not None:
            self.cells.cut(index, 0)
        actions.append(Drop(index))

    def make_room(self, needed: int, actions: list[Action], *, keep: Source = None) -> bool:
        """Drop idle slots of a unified memory, the least worthy first, until `needed` cells are free.

        None of them if all would not do.
        """
        if self.cells is None or self.cells.n_free >= needed:
            return True
        if self.n_available(keep=keep) < needed:
            return False
        while self.cells.n_free < needed:
            index = self._worth.least(self._idle(keep), self._rate)
            assert index is not None, "n_available counted them"
            self._rescue(index, actions)
            self.drop(index, actions)
        return True

    def n_available(self, *, keep: Source = None, also: Iterable[int] = ()) -> int:
        """Cells of a unified memory that are free, or would be if idle slots but `keep`, and `also`, went."""
        assert self.cells is not None
        return self.cells.n_free + self.cells.n_alone({*self._idle(keep), *also} - {keep})

    def _idle(self, keep: Source) -> set[int]:
        """Idle slots that hold something, but for `keep`."""
        return {
            index
            for index, slot in enumerate(self.slots)
            if slot.sequence is None and slot.tokens and index != keep
        }

    def _rate(self, index: int) -> float:
        """What it costs if an idle slot gives way, for the room that it makes: a slot, or cells."""
        n_lost = self._n_alone(index)
        if n_lost >= MIN_SAVED and self.stash.fits(self._size_bytes(index)):  # it comes back from there
            copied = int(self.costs.copied * len(self.slots[index].tokens))
            n_lost = min(n_lost, self.costs.restore + copied)
        return n_lost if self.cells is None else n_lost / max(1, self.cells.n_alone({index}))

    def _cost(self, state: State, tier: Tier) -> int:
        """Tokens that would have to be computed again without a state; for the disk, after a crash."""
        return self._n_alone(state) if tier == "ram" else self._n_beyond(state, _is_on_disk)

    def _n_alone(self, holder: int | State) -> int:
        """Tokens that would have to be computed again if what this one holds were lost."""
        return self._n_beyond(holder) if self.n_window else self.tree.n_alone(holder)

    def _n_beyond(self, holder: int | State, counts: Callable[[int | State], bool] = lambda _: True) -> int:
        """Of one's tokens, how many no other who counts can bring."""
        held = holder if isinstance(holder, State) else self.slots[holder]
        for match in self.tree.matches(held.tokens, held.namespace):
            others = [each for each in match.holders if isinstance(each, int | State) and each != holder]
            if any(self._can_copy(other, match.length) for other in others if counts(other)):
                return len(held.tokens) - match.length
        return len(held.tokens)

    def _size_bytes(self, index: int) -> int:
        """Of a state of what a slot holds."""
        return len(self.slots[index].tokens) * self.token_bytes

    def _rescue(self, index: int, actions: list[Action], *, n_kept: int = 0) -> None:
        """A slot will lose all but `n_kept` tokens: save it if what only it holds of them is much."""
        n_lost = len(self.slots[index].tokens) - n_kept
        if min(n_lost, self._n_alone(index)) >= MIN_SAVED:
            self.save(index, actions, n_kept=n_kept)

    def _can_bring(self, holder: int | State, length: int, sequence: Sequence) -> bool:
        """Whether a sequence can go on from the first `length` tokens of a holder."""
        if self._can_copy(holder, length):
            return True
        # Where it is, a stream keeps every cell that was computed in it (Context.open: swa_full).
        if isinstance(holder, State) or self.cells is not None:
            return False
        slot = self.slots[holder]
        stays = slot.sequence is None if sequence.slot is None else sequence.slot == holder
        return stays and slot.n_brought <= length

    def _can_copy(self, holder: int | State, length: int) -> bool:
        """Whether the cells that the next token looks back on would come along.

        In layers with a window llama.cpp saves no others than those that the holder's own next token would
        look back on, and in a unified memory it overwrites the others when it likes.
        """
        held = len(holder.tokens if isinstance(holder, State) else self.slots[holder].tokens)
        return held < self.n_window or held <= length or not self.n_window

    def _can_come(self, holder: int | State) -> bool:
        """Whether cells for all of a state are there: it comes whole, however little of it is wanted."""
        if self.cells is None or isinstance(holder, int) or holder.length <= self.cells.n_free:
            return True
        return holder.length <= self.n_available()

    def _is_taken(self, index: int, length: int) -> bool:
        """Whether an idle slot is taken itself and not copied: it loses no more than half, or cannot be."""
        return 2 * length >= len(self.slots[index].tokens) or not self._can_copy(index, length)

    def _n_lost_more(self, index: int, length: int) -> int:
        """Tokens lost if an idle slot is cut to `length`, beyond those lost if another idle one is taken."""
        free = [each for each, slot in enumerate(self.slots) if slot.sequence is None and each != index]
        if not free:
            return 0
        n_lost = min(len(self.slots[index].tokens) - length, self._n_alone(index))
        return max(0, n_lost - min(self._n_alone(each) for each in free))

    def _target(self, free: list[int], source: Source, length: int) -> int:
        """The idle slot that holds most of it already, else an empty one, else the least worthy.

        In streams, of those beside or between running ones, where there are any (Scheduler._close_ranks).
        """
        if isinstance(source, int) and source in free and self._is_taken(source, length):
            return source
        others = [index for index in free if index != source] or free
        busy = self.busy
        if self.cells is None and busy:
            others = [index for index in others if busy[0] - 1 <= index <= busy[-1] + 1] or others
        empty = [index for index in others if not self.slots[index].tokens]
        if empty:
            return empty[0]
        target = self._worth.least(others, self._rate)
        assert target is not None, "somebody asked for a slot without there being one"
        return target


def _is_on_disk(holder: int | State) -> bool:
    return isinstance(holder, State) and "disk" in holder.tiers
