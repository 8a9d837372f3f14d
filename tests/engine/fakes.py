"""A model without numbers: its next token is the last one plus one. It keeps cells as llama.cpp would."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from engine.prefix import PrefixTree
from engine.scheduler import Scheduler
from engine.sequence import Action, Begin, Chunk, Drop, Plan, Save, Sequence
from engine.stash import Demote, Discard, State
from engine.turns import Limits

VOCABULARY = 7
N_SETS = 3  # of adapters, that tests run at once
MOST_WAITED = (
    60  # calls of a stream that others' prompts and adapters take turns with, one token a call at worst
)

Cell = tuple[int, int]  # token, and a number of its own


@dataclass
class FakeModel:
    """Does what the scheduler says and checks that it may be said."""

    scheduler: Scheduler
    n_ctx: int
    n_cells: int | None = None  # unified when given
    slots: dict[int, list[Cell]] = field(default_factory=dict)
    states: dict[State, list[int]] = field(default_factory=dict)
    calls: list[list[Chunk]] = field(default_factory=list)
    computed: dict[object, int] = field(default_factory=dict)  # id -> tokens computed for it
    waited: dict[Sequence, int] = field(default_factory=dict)  # calls since a stream was in one
    stalls: dict[Sequence, tuple[int, float]] = field(default_factory=dict)  # of prompts, and the limit
    # The first position whose cells are there in layers with a window.
    first: dict[int | State, int] = field(default_factory=dict)
    numbers: itertools.count = field(default_factory=itertools.count)

    def step(
        self,
        *,
        n_prompt: int | None = None,
        n_brief: int | None = None,
        drafts: Mapping[Sequence, list[int]] | None = None,
    ):
        """Admit, compute, write; the sequences that ended."""
        self.act(self.scheduler.admit())
        expected, n_preempted = self.scheduler.next_adapters, self.scheduler.n_preempted
        reads = any(not each.is_writing for each in self.scheduler.running)
        plan = self.scheduler.plan(limits=Limits(n_prompt, n_brief), drafts=drafts)
        assert plan.adapters == expected or reads or self.scheduler.n_preempted > n_preempted
        self.act(plan.actions)
        self.check_plan(plan, n_prompt)
        self.calls.append(plan.chunks)
        ended = []
        for chunk in plan.chunks:
            self.compute(chunk)
            if not chunk.samples:
                self.scheduler.computed(chunk)
            elif self.write(chunk):
                self.act(self.scheduler.release(chunk.sequence))
                ended.append(chunk.sequence)
        return ended

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Begin(sequence, slot, source, length):
                    self.begin(sequence, slot, source, length)
                case Save(slot, state):
                    held = [token for token, _ in self.slots[slot]]
                    assert held[: state.length] == state.tokens, "saves what is not there"
                    self.states[state] = state.tokens
                    self.first[state] = self.first_left(slot)
                case Drop(slot):
                    self.slots[slot], self.first[slot] = [], 0
                case Demote(state):
                    assert state in self.states
                case Discard(state):
                    del self.states[state]

    def begin(self, sequence: Sequence, slot: int, source, length: int) -> None:
        if source is None:
            assert length == 0
            cells: list[Cell] = []
        elif isinstance(source, State):
            # All of it is brought, and cut then.
            self.slots[slot] = [(token, next(self.numbers)) for token in self.states[source]]
            self.check_room()
            cells = self.slots[slot][:length]
        else:
            cells = self.slots[source][:length]
            if source != slot and self.n_cells is None:
                cells = [(token, next(self.numbers)) for token, _ in cells]
        assert [token for token, _ in cells] == sequence.tokens[:length], "shares what differs"
        assert len(cells) == length, "shares more than is held"
        self.first[slot] = self.first_after(slot, source)
        self.slots[slot] = list(cells)
        self.check_room()

    def first_left(self, slot: int) -> int:
        """Of a slot, if nothing that its window has left behind is there any more."""
        return max(self.first.get(slot, 0), len(self.slots[slot]) - self.scheduler.held.n_window)

    def first_after(self, slot: int, source) -> int:
        """What a slot has after it was given its tokens: in a unified memory the worst is supposed."""
        if source is None:
            return 0
        if isinstance(source, State):
            return self.first.get(source, 0)
        return self.first.get(slot, 0) if source == slot and self.n_cells is None else self.first_left(source)

    def check_plan(self, plan: Plan, n_prompt: int | None) -> None:
        chunks = plan.chunks
        sizes = [len(chunk.tokens) for chunk in chunks]
        assert all(sizes), "an empty chunk"
        assert sum(sizes) <= self.scheduler.n_batch
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks), "one chunk a sequence"
        assert all(chunk.sequence.adapters == plan.adapters for chunk in chunks)
        prompts = [len(chunk.tokens) for chunk in chunks if not chunk.is_writing]
        if n_prompt is not None and any(each.is_writing for each in self.scheduler.running):
            assert sum(prompts) <= n_prompt + n_prompt // 5
        self.check_stall(plan, sum(prompts), n_prompt)
        self.check_turns(plan)

    def check_stall(self, plan: Plan, n_tokens: int, n_prompt: int | None) -> None:
        """Between two tokens of a stream there are no more of prompts, whosever, than a call may hold."""
        called = {chunk.sequence for chunk in plan.chunks}
        before, self.stalls = self.stalls, {}
        for each in self.scheduler.running:
            if each.is_writing:
                heard, most = before.get(each, (0, 0))
                heard, most = heard + n_tokens, max(most, inf if n_prompt is None else n_prompt)
                assert heard <= most * 1.2, "a stream waits for too much of prompts"
                self.stalls[each] = (0, 0) if each in called else (heard, most)

    def check_turns(self, plan: Plan) -> None:
        """Who writes is soon in a call, and who waits for a leader is behind nobody less deserving."""
        called = {chunk.sequence for chunk in plan.chunks}
        running = self.scheduler.running
        self.waited = {
            each: self.waited.get(each, 0) + 1 for each in running if each.is_writing and each not in called
        }
        assert max(self.waited.values(), default=0) <= MOST_WAITED, "a stream starves"
        prompts = [chunk.sequence for chunk in plan.chunks if not chunk.is_writing]
        for each in running:
            leader = each.leader
            if leader in running and leader not in called and each.adapters == plan.adapters:
                if self.scheduler.turns.is_over_share(each):
                    continue  # it gives way to others however little it was served
                self.check_rank(each, prompts)

    def check_rank(self, sequence: Sequence, others: list[Sequence]) -> None:
        rank = self.rank(sequence)
        for other in others:
            followers = [each for each in self.scheduler.running if each.leader is other]
            ranks = [self.rank(each) for each in (other, *followers)]
            assert min(ranks) <= rank, "a leader is behind its follower"

    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        return (*self.scheduler.queue.rank(sequence), sequence.age)

    def compute(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert sequence.slot is not None
        cells = self.slots[sequence.slot]
        assert chunk.start == sequence.n_computed
        assert [token for token, _ in cells] == sequence.tokens[: chunk.start], "cells and record differ"
        n_window = self.scheduler.held.n_window
        assert not n_window or self.first[sequence.slot] <= max(0, chunk.start - n_window + 1), "lost cells"
        known = chunk.tokens[: len(chunk.tokens) - chunk.n_draft]
        end = chunk.start + len(known)
        assert known == sequence.tokens[chunk.start : end]
        assert chunk.samples == (end == len(sequence.tokens))
        cells.extend((token, next(self.numbers)) for token in chunk.tokens)
        self.check_room()
        assert len(cells) < self.n_ctx
        self.computed[sequence.id] = self.computed.get(sequence.id, 0) + len(chunk.tokens)

    def write(self, chunk: Chunk) -> bool:
        """Choose tokens as far as the guesses are right; whether the sequence ended."""
        sequence = chunk.sequence
        guesses = chunk.tokens[len(chunk.tokens) - chunk.n_draft :]
        n_right, goes_on = 0, True
        written = []
        for guess in [*guesses, None]:
            last = written[-1] if written else sequence.tokens[-1]
            written.append((last + 1) % VOCABULARY)
            goes_on = sequence.n_written + len(written) < sequence.max_tokens
            if written[-1] != guess or not goes_on:
                break
            n_right += 1
        n_kept = len(chunk.tokens) - chunk.n_draft + n_right
        assert sequence.slot is not None
        del self.slots[sequence.slot][chunk.start + n_kept :]
        # The guesses that were right are cells of tokens that are written only now.
        self.scheduler.computed(chunk, n_kept)
        for token in written:
            goes_on = self.scheduler.wrote(sequence, token)
        return not goes_on

    def check_room(self) -> None:
        if self.n_cells is not None:
            assert self.n_used <= self.n_cells, "more cells than there are"

    @property
    def n_used(self) -> int:
        return len({number for cells in self.slots.values() for _, number in cells})

    def check_books(self) -> None:
        """What the scheduler believes is what there is."""
        held = self.scheduler.held
        for index, slot in enumerate(held.slots):
            assert [token for token, _ in self.slots.get(index, [])] == slot.tokens
            assert (index in held.tree) == bool(slot.tokens)
            if slot.sequence is not None:
                assert len(slot.tokens) == slot.sequence.n_computed
        if held.cells is not None:
            assert held.cells.n_used == self.n_used
        assert set(self.states) == held.stash.states
        for tier in ("ram", "disk"):
            size = sum(state.size_bytes for state in self.states if tier in state.tiers)
            assert held.stash.used[tier] == size
        check_tree(held.tree)


def check_tree(tree: PrefixTree) -> None:
    """No node without holders, none that could be joined with its child, children where they belong."""
    for root in tree._roots.values():
        todo = list(root.children.items())
        assert todo, "a namespace that nobody uses"
        while todo:
            first, node = todo.pop()
            assert node.tokens[0] == first
            assert node.holders
            for child in node.children.values():
                assert child.parent is node
                assert child.holders <= node.holders
            todo += node.children.items()


def fake(
    *, n_slots: int = 2, n_batch: int = 8, n_ctx: int = 64, n_cells: int | None = None, **options
) -> FakeModel:
    scheduler = Scheduler(n_slots=n_slots, n_batch=n_batch, n_cells=n_cells, **options)
    return FakeModel(scheduler, n_ctx, n_cells)


def prompt(length: int, *, start: int = 0) -> tuple[int, ...]:
    """A prompt of which no two with different `start` share a prefix."""
    return (VOCABULARY + start, *range(1000, 1000 + length - 1))


def run(model: FakeModel, *sequences: Sequence, limit: int = 2000, **options) -> None:
    for sequence in sequences:
        model.scheduler.add(sequence)
    while not model.scheduler.idle:
        model.step(**options)
        limit -= 1
        assert limit, "does not end"
    model.check_books()
