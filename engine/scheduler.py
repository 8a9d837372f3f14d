"""Choose which sequences join the next llama_decode call.

Pure bookkeeping: no C calls, no text, no clock. The loop asks, the scheduler answers.

A slot is one sequence id of the KV memory. It holds the tokens whose cells are computed, also after its
request has ended, so that a later request can go on from them or copy them (holdings.py).

The policy, in the order of the code:
- In streams llama.cpp computes together what lies in neighbouring slots: new sequences go next to those that
  run (Holdings._target), and a sequence is moved into a gap that another one left (_close_ranks).
- Who goes first is the fair queue's to say (_next, FairQueue.ready). Where slots or cells are short,
  sequences of lower priority, or of a tenant that runs more than its share, make way (_less_deserving,
  _making_way): their cells are saved, and they go on later from the same token (_preempt).
- A sequence begins with the longest prefix that anybody holds, busy or idle, less what bringing it costs
  (Holdings.source), if there are cells for it and for what others have yet to read (_needed).
- Of prompts that begin alike, the oldest computes the common part; the others wait for it and share its cells
  (leaders.py, _join).
- Each writing sequence gets one token in every call, and guesses behind it when it has some; the rest of the
  call is filled with prompts, up to the size that the loop allows while others are writing; who runs more
  than its share gives way there, too (turns.py).
- Sequences with other LoRA adapters cannot be in one call: sets of adapters take turns (rotation.py).
- In a unified memory cells can run out: idle slots are dropped first (Holdings.make_room), then the youngest
  sequence of the lowest priority makes way (_with_cells).

What stays true whatever the policy (tests/engine/test_scheduler_traces.py):
- A plan never holds more tokens than there are free cells.
- Of those that run, somebody computes in every call; nobody waits for ever.
- A leader is never behind its followers.
- One sequence alone always fits.
- If the one that deserves a slot most does not fit, nobody behind it is let in.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from engine.fairness import Charged, FairQueue
from engine.holdings import Costs, Holdings, Source
from engine.leaders import leader_of, may_join
from engine.rotation import Rotation
from engine.sequence import Action, Begin, Chunk, Plan, Sequence, Slot
from engine.stash import State
from engine.turns import Limits, Turns

MIN_MOVED = 16  # tokens worth saving when a sequence makes way
PATIENCE = 4  # calls that a gap between running sequences may last: often the next request fills it
GROWTH = 16  # tokens that each running sequence may be expected to write before another one ends


class Scheduler:
    """Waiting requests, running sequences, and what slots and saved states remember."""

    def __init__(
        self,
        *,
        n_slots: int,
        n_batch: int,
        n_cells: int | None = None,
        share_prefixes: bool = True,
        n_window: int = 0,
        costs: Costs | None = None,
        ram_bytes: int = 0,
        disk_bytes: int = 0,
        token_bytes: int = 1,
    ) -> None:
        """`n_cells`: of a unified memory, at least what one sequence can need; None: each slot has its own.

        `n_window`: the tokens that attention looks back on in some layers; 0 for all. Of longer prefixes a
        copy has no more, so that only the whole of what somebody holds can be copied (Holdings._can_copy).
        `ram_bytes`, `disk_bytes`: budgets of saved states, `token_bytes`: what a token of theirs takes.
        """
        self.n_batch = n_batch
        self.queue: FairQueue[Sequence] = FairQueue()
        self.held = Holdings(
            n_slots=n_slots,
            n_cells=n_cells,
            share_prefixes=share_prefixes,
            n_window=n_window,
            costs=costs or Costs(),
            ram_bytes=ram_bytes,
            disk_bytes=disk_bytes,
            token_bytes=token_bytes,
        )
        self.turns = Turns(self.queue, n_slots=n_slots, leaders_stop=bool(n_window))
        self.rotation = Rotation()
        self.n_preempted = 0
        self._n_calls_with_gaps = 0

    # What there is

    @property
    def slots(self) -> list[Slot]:
        return self.held.slots

    @property
    def running(self) -> list[Sequence]:
        """Admitted sequences, in slot order, which stays the same from call to call."""
        return [slot.sequence for slot in self.held.slots if slot.sequence is not None]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not len(self.queue)

    @property
    def only_writes(self) -> bool:
        """Whether every sequence that can be in the next call is past its prompt."""
        if len(self.queue) and any(slot.sequence is None for slot in self.slots):
            return False
        return all(slot.sequence is None or slot.sequence.is_writing for slot in self.slots)

    def n_waiting_with(self, more: int) -> int:
        """Requests that would wait for a slot at the next call if `more` came."""
        free = sum(slot.sequence is None for slot in self.slots)
        return max(0, len(self.queue) + more - free)

    def is_full_for(self, tenant: Charged, max_queue: int) -> bool:
        """Whether another request of this tenant would be one too many (FairQueue.is_full_for)."""
        return self.queue.is_full_for(tenant, max_queue, n_waiting=self.n_waiting_with(1))

    # Requests come and go

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.queue.add(sequence)

    def adopt(self, states: Iterable[State]) -> list[Action]:
        """Know states that an earlier process left on disk."""
        return self.held.adopt(states)

    def back_up(self) -> list[Action]:
        """Nobody asks: one thing that only this process knows goes to disk; nothing if all is there."""
        return self.held.back_up()

    def retire(self) -> list[Action]:
        """The end of all: what is worth it goes to disk."""
        return self.held.retire()

    def release(self, sequence: Sequence, *, forget: bool = False) -> list[Action]:
        """End a sequence, running or waiting; its slot keeps the computed tokens unless `forget`."""
        actions: list[Action] = []
        if sequence.state is not None:  # others may still begin with it
            sequence.state.pinned, sequence.state = False, None
        if sequence.slot is None:
            self.queue.remove(sequence)
            return actions
        index, sequence.slot = sequence.slot, None
        self.held.leave(index)
        self.queue.ended(sequence)
        if forget or not self.held.share_prefixes:
            self.held.drop(index, actions)
        return actions

    def computed(self, chunk: Chunk, n_kept: int | None = None) -> None:
        """A chunk of the plan was decoded; its first `n_kept` tokens have cells now (None: all)."""
        sequence = chunk.sequence
        tokens = chunk.tokens if n_kept is None else chunk.tokens[:n_kept]
        assert sequence.slot is not None
        sequence.n_computed += len(tokens)
        self.held.append(sequence.slot, tokens, sequence.namespace)
        self.queue.charge(sequence, len(tokens))

    def wrote(self, sequence: Sequence, token: int) -> bool:
        """A token was chosen; returns whether the sequence may write another."""
        sequence.tokens.append(token)
        return sequence.n_written < sequence.max_tokens

    def lost(self, what: Begin | State) -> list[Action]:
        """A state is gone, or what a sequence should have begun with did not come: all is to be computed.

        A state that did not come never will: while it is believed in, nobody saves these tokens again.
        """
        actions: list[Action] = []
        state = what.source if isinstance(what, Begin) else what
        if isinstance(state, State):
            self.held.discard(state, actions)
        return self._begin_anew(what, actions) if isinstance(what, Begin) else actions

    def _begin_anew(self, begin: Begin, actions: list[Action]) -> list[Action]:
        sequence = begin.sequence
        if sequence.slot == begin.slot:  # else it has made way meanwhile, and begins anew later
            self.held.drop(begin.slot, actions)
            sequence.n_computed = 0
            if not sequence.n_written:
                sequence.n_cached = 0
        return actions

    # Who runs

    def admit(self) -> list[Action]:
        """Let followers have what was computed for them, and give slots to waiting requests in fair order."""
        actions: list[Action] = []
        if any(slot.sequence is not None and slot.sequence.leader for slot in self.slots):
            for each in self._by_age():
                if may_join(each):
                    self._join(each, actions)
        while (sequence := self._next()) is not None:
            if not self._place(sequence, actions):
                break
        if self.held.cells is None:
            self._close_ranks(actions)
        return actions

    def _gaps(self) -> list[int]:
        """Idle slots between running ones."""
        busy = self.held.busy
        return [index for index in range(busy[0], busy[-1]) if index not in busy] if busy else []

    def _close_ranks(self, actions: list[Action]) -> None:
        """Move sequences of the ends into gaps between others, the one with fewest cells first.

        Streams that are no neighbours are calls of their own within llama.cpp, each of which reads all
        weights: moving a sequence takes about as long as one such call more.
        """
        gaps = self._gaps()
        self._n_calls_with_gaps = self._n_calls_with_gaps + 1 if gaps else 0
        while gaps and self._n_calls_with_gaps > PATIENCE:
            running = self.running
            mover = min(running[0], running[-1], key=lambda each: each.n_computed)
            self.held.move(mover, gaps[0], actions)
            gaps = self._gaps()

    def _next(self) -> Sequence | None:
        """The request that deserves a slot most, if there is one for it."""
        if not len(self.queue):
            return None
        ready = self.queue.ready()
        if not ready:
            return None
        if any(slot.sequence is None for slot in self.slots):
            return ready[0]
        asked: set[tuple[int, bool]] = set()
        for each in ready:
            kind = each.tenant.priority, self._has_its_share(each)
            if kind not in asked and self._less_deserving(each) is not None:
                return each
            asked.add(kind)  # the answer is the same for all of a kind
        return None

    def _has_its_share(self, candidate: Sequence) -> bool:
        """Whether a request's tenant runs as much as is due to it."""
        share = self.queue.share(candidate.tenant, len(self.slots))
        return self.queue.n_running(candidate) + 1 > max(1.0, share)

    def _less_deserving(self, candidate: Sequence, gone: Iterable[Sequence] = ()) -> Sequence | None:
        """Who makes way for a request, after those `gone`: lower priority, else a tenant over its share."""
        running = [each for each in self.running if each not in gone]
        queue, n_slots = self.queue, len(self.slots)
        priority = candidate.tenant.priority
        if any(each.tenant.priority < priority for each in running):
            return self._first_to_go(running)
        if self._has_its_share(candidate):
            return None
        over = [
            each
            for each in running
            if each.tenant.priority == priority
            and queue.n_running(each) - sum(other.tenant.name == each.tenant.name for other in gone)
            > max(1.0, queue.share(each.tenant, n_slots))
        ]
        return max(over, key=lambda each: (queue.served(each), each.age), default=None)

    @staticmethod
    def _first_to_go(sequences: Iterable[Sequence]) -> Sequence:
        """The youngest of the lowest priority."""
        return max(sequences, key=lambda each: (-each.tenant.priority, each.age))

    def _preempt(self, sequence: Sequence, actions: list[Action]) -> None:
        """Take a sequence's slot from it; it will go on from the same token."""
        index = sequence.slot
        assert index is not None
        self.n_preempted += 1
        if sequence.n_computed >= MIN_MOVED:
            sequence.state = self.held.save(index, actions, pinned=True)
        self.queue.add(sequence, first=True)
        self.queue.ended(sequence)
        self.held.leave(index, saved=sequence.state is not None)
        sequence.slot, sequence.leader = None, None
        sequence.n_computed, sequence.gave_way = 0, False
        if not self.held.share_prefixes:
            self.held.drop(index, actions)

    # What it begins with

    def _place(self, sequence: Sequence, actions: list[Action]) -> bool:
        """Give a waiting sequence a slot and the best prefix there is; False when cells are short.

        Nobody makes way unless it fits then.
        """
        source, length = self.held.source(sequence)
        victims = self._making_way(sequence, source, length)
        if victims is None:
            return False
        with self._pinned(source):
            for victim in victims:
                self._preempt(victim, actions)
            if fits := self._has_room(sequence, source, length, actions):
                self.queue.started(sequence)
                self.held.take(sequence, source, length, actions)
                self._began(sequence, length, source)
                self._follow(sequence, length)
        if fits and sequence.state is not None:
            state, sequence.state = sequence.state, None
            self.held.discard(state, actions)
        return fits

    @contextmanager
    def _pinned(self, source: Source) -> Iterator[None]:
        """A state that somebody begins with must not give way to what gives way for it."""
        if not isinstance(source, State):
            yield
            return
        was_pinned, source.pinned = source.pinned, True
        try:
            yield
        finally:
            source.pinned = was_pinned

    def _making_way(self, sequence: Sequence, source: Source, length: int) -> list[Sequence] | None:
        """Those whose slot or cells a request needs; None if there are too few that deserve them less."""
        gone: list[Sequence] = []
        needs_slot = all(slot.sequence is not None for slot in self.slots)
        while needs_slot or not self._would_fit(sequence, source, length, gone):
            victim = self._less_deserving(sequence, gone)
            if victim is None:
                return None
            gone.append(victim)
            needs_slot = False
        return gone

    def _would_fit(self, sequence: Sequence, source: Source, length: int, gone: list[Sequence]) -> bool:
        """Whether there were cells enough without those `gone`, and without all that is idle."""
        beside = [each for each in self.running if each not in gone]
        if self.held.cells is None or not beside:
            return True
        slots = [each.slot for each in gone if each.slot is not None]
        return self._needed(sequence, source, length, beside) <= self.held.n_available(
            keep=source, also=slots
        )

    def _has_room(self, sequence: Sequence, source: Source, length: int, actions: list[Action]) -> bool:
        """Make room for the sequence; whether there is."""
        needed = self._needed(sequence, source, length, self.running)
        return self.held.make_room(needed, actions, keep=source) or not self.running

    def _needed(self, sequence: Sequence, source: Source, length: int, beside: list[Sequence]) -> int:
        """Free cells that it takes to begin, so that it and those `beside` can go on for a while.

        Whoever is still reading its prompt will fill cells too, but for those that its leader fills.
        """
        shared = length if isinstance(source, int) else 0
        leader, n_shared = self._leader(sequence, length)
        if leader is not None and leader in beside:
            shared += n_shared - length
        needed = len(sequence.tokens) - shared + sum(GROWTH + each.n_unread for each in beside)
        # A state comes whole before it is cut.
        return max(needed, source.length) if isinstance(source, State) else needed

    def _began(self, sequence: Sequence, length: int, source: Source) -> None:
        sequence.n_computed = length
        if sequence.n_cached is None or (sequence.state is None and not sequence.n_written):
            sequence.n_cached = min(length, len(sequence.prompt))
            sequence.cached_tier = source.tier if isinstance(source, State) else "slot"

    def _follow(self, sequence: Sequence, length: int) -> None:
        """Find an older prompt, still being computed, that will hold more of this one than `length`."""
        sequence.leader, sequence.n_shared = self._leader(sequence, length)

    def _leader(self, sequence: Sequence, length: int) -> tuple[Sequence | None, int]:
        """Whom to follow, and how many tokens of it."""
        held = self.held
        if not held.share_prefixes:
            return None, length
        stops = bool(held.n_window)
        return leader_of(sequence, length, self._by_age(), cost=held.costs.copy, stops=stops)

    def _join(self, sequence: Sequence, actions: list[Action]) -> None:
        """Take what another slot has now, or saved, if that is worth bringing; look for the next leader."""
        assert sequence.slot is not None
        source, length = self.held.source(sequence)
        needed = source.length if isinstance(source, State) else 0
        with self._pinned(source):
            if (
                source is None
                or length <= sequence.n_computed + self.held.cost(source, length)
                or not self.held.make_room(needed, actions, keep=source)
            ):
                source, length = sequence.slot, sequence.n_computed
        self.held.begin(sequence, source, length, actions)
        if source != sequence.slot:
            self._began(sequence, length, source)
        self._follow(sequence, length)

    # The next call

    def plan(
        self,
        *,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        drafts: Mapping[Sequence, list[int]] | None = None,
    ) -> Plan:
        """The next call.

        `limits`: tokens of prompts between two of who writes; `drafts`: guesses of who does.
        """
        actions: list[Action] = []
        self.queue.called()
        group = self._with_cells(lambda: self.rotation.group(self.running, self._limit(limits)), actions)
        adapters = group[0].adapters if group else ()
        portion = self.rotation.portion(adapters, self.running, self._limit(limits))
        cells = self.held.cells
        room = self.n_batch if cells is None else min(self.n_batch, cells.n_free)
        now = replace(limits, prompt=portion)
        chunks = self.turns.chunks(group, self.running, room=room, limits=now, drafts=drafts or {})
        return Plan(chunks, actions, adapters)

    def _limit(self, limits: Limits) -> int | None:
        """Who writes with other adapters waits for this call too."""
        return limits.prompt if any(each.is_writing for each in self.running) else None

    @property
    def next_adapters(self) -> Hashable:
        """Whose turn the next call is if nobody reads a prompt, and before its cells are counted."""
        return self.rotation.next(self.running)

    def _with_cells(self, choose: Callable[[], list[Sequence]], actions: list[Action]) -> list[Sequence]:
        """Let the youngest make way until the next tokens of the chosen have cells; who is left of them."""
        group = choose()
        while True:
            n_writing = sum(each.is_writing for each in group)
            if self.held.make_room(n_writing + (n_writing < len(group)), actions):
                return group
            victim = self._first_to_go(self.running)
            assert len(self.running) > 1, "one sequence alone always fits"
            self._preempt(victim, actions)
            group = [each for each in group if each is not victim]
            if not any(each.is_writing for each in group):  # then their prompts may have to wait
                group = choose()

    def _by_age(self) -> list[Sequence]:
        """Running sequences, the first admitted first."""
        return sorted(self.running, key=lambda sequence: sequence.age)
