"""Scheduling, proven with a fake model whose next token is the last one plus one, in a small vocabulary."""

import random
from dataclasses import dataclass, field

import pytest

from engine.scheduler import MIN_SHARED, Chunk, Scheduler, Sequence

VOCABULARY = 7


@dataclass
class FakeModel:
    """Keeps the cells of every slot and checks what it is asked to compute."""

    scheduler: Scheduler
    n_batch: int
    n_ctx: int
    cells: dict[int, list[int]] = field(default_factory=dict)
    calls: list[list[Chunk]] = field(default_factory=list)
    computed: dict[object, int] = field(default_factory=dict)  # id -> tokens computed for it

    def step(self) -> list[Sequence]:
        """Admit, compute, write; the sequences that ended."""
        for admission in self.scheduler.admit():
            source = self.cells.get(admission.source, [])
            assert admission.length <= len(source), "shares more than is held"
            assert source[: admission.length] == list(admission.sequence.prompt[: admission.length])
            assert admission.sequence.slot is not None
            self.cells[admission.sequence.slot] = source[: admission.length]
        plan = self.scheduler.plan()
        self.calls.append(plan)
        assert sum(len(chunk.tokens) for chunk in plan) <= self.n_batch
        assert len({id(chunk.sequence) for chunk in plan}) == len(plan), "one chunk a sequence"
        ended = []
        for chunk in plan:
            self._compute(chunk)
            if chunk.samples:
                last = (*chunk.sequence.prompt, *chunk.sequence.written)[-1]
                if not self.scheduler.wrote(chunk.sequence, (last + 1) % VOCABULARY):
                    self.scheduler.release(chunk.sequence)
                    ended.append(chunk.sequence)
        return ended

    def _compute(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        tokens = [*sequence.prompt, *sequence.written]
        assert chunk.tokens, "an empty chunk"
        assert chunk.start == sequence.n_computed
        assert chunk.tokens == tokens[chunk.start : chunk.start + len(chunk.tokens)]
        assert chunk.samples == (chunk.start + len(chunk.tokens) == len(tokens))
        assert sequence.slot is not None
        cells = self.cells[sequence.slot]
        assert cells == tokens[: chunk.start], "cells and record differ"
        cells.extend(chunk.tokens)
        assert len(cells) < self.n_ctx
        self.computed[sequence.id] = self.computed.get(sequence.id, 0) + len(chunk.tokens)
        self.scheduler.computed(chunk)


def fake(*, n_slots: int = 2, n_batch: int = 8, n_ctx: int = 64, **options) -> FakeModel:
    return FakeModel(Scheduler(n_slots=n_slots, n_batch=n_batch, **options), n_batch, n_ctx)


def prompt(length: int, *, start: int = 0) -> tuple[int, ...]:
    """A prompt of which no two with different `start` share a prefix."""
    return (VOCABULARY + start, *range(1000, 1000 + length - 1))


def run(model: FakeModel, *sequences: Sequence, limit: int = 1000) -> None:
    for sequence in sequences:
        model.scheduler.add(sequence)
    while not model.scheduler.idle:
        model.step()
        limit -= 1
        assert limit, "does not end"


def test_a_sequence_writes_last_plus_one_until_max_tokens():
    sequence = Sequence("a", (1, 2, 3), max_tokens=5)
    run(fake(), sequence)
    assert sequence.written == [4, 5, 6, 0, 1]


def test_a_long_prompt_is_computed_in_chunks_of_the_call_size():
    model = fake(n_batch=8)
    run(model, Sequence("a", prompt(20), max_tokens=1))
    assert [len(call[0].tokens) for call in model.calls] == [8, 8, 4]


def test_a_long_prompt_never_stops_those_that_write():
    model = fake(n_batch=8, n_shared_chunk=2)
    writer = Sequence("writer", prompt(3), max_tokens=30)
    model.scheduler.add(writer)
    model.step()
    model.scheduler.add(Sequence("long", prompt(20, start=1), max_tokens=1))
    for _ in range(10):
        before = len(writer.written)
        model.step()
        assert len(writer.written) == before + 1
        assert sum(len(chunk.tokens) for chunk in model.calls[-1]) <= 3


def test_several_short_prompts_share_one_call():
    model = fake(n_slots=3, n_batch=16)
    run(model, *(Sequence(i, prompt(5, start=i), max_tokens=1) for i in range(3)))
    assert len(model.calls) == 1


def test_admission_is_in_order_of_arrival():
    model = fake(n_slots=1)
    sequences = [Sequence(i, prompt(3, start=i), max_tokens=2) for i in range(6)]
    for sequence in sequences:
        model.scheduler.add(sequence)
    ended = []
    while not model.scheduler.idle:
        ended += model.step()
    assert [sequence.id for sequence in ended] == list(range(6))


def test_the_same_prompt_again_computes_its_last_token_only():
    model = fake()
    run(model, Sequence("a", prompt(20), max_tokens=3))
    again = Sequence("b", prompt(20), max_tokens=3)
    run(model, again)
    assert again.n_cached == 19
    assert model.computed["b"] == 1 + 2


def test_a_prefix_held_by_a_busy_slot_is_shared():
    model = fake(n_batch=64)
    busy = Sequence("busy", prompt(20), max_tokens=40)
    model.scheduler.add(busy)
    model.step()
    other = Sequence("other", (*prompt(20), 5), max_tokens=1)
    model.scheduler.add(other)
    model.step()
    assert other.n_cached == 20
    assert busy.slot is not None


@pytest.mark.parametrize("n_slots", [2, 8])
def test_prompts_that_arrive_together_compute_their_common_part_once(n_slots):
    model = fake(n_slots=n_slots, n_batch=32, n_ctx=256)
    common = prompt(100)
    run(model, *(Sequence(i, (*common, 5000 + i, i), max_tokens=2) for i in range(8)))
    assert sum(model.computed.values()) == 100 + 8 * 2 + 8 * 1


def test_followers_of_a_cancelled_leader_go_on():
    model = fake(n_slots=3, n_batch=16, n_ctx=256)
    sequences = [Sequence(i, (*prompt(100), 5000 + i), max_tokens=2) for i in range(3)]
    for sequence in sequences:
        model.scheduler.add(sequence)
    model.step()
    model.step()
    model.scheduler.release(sequences[0])
    run(model)
    assert [len(sequence.written) for sequence in sequences] == [0, 2, 2]
    assert model.computed[1] + model.computed[2] == 100 - 32 + 2 + 2, "what the leader left is used, once"


def test_followers_of_a_failed_leader_compute_it_all():
    model = fake(n_slots=2, n_batch=16, n_ctx=256)
    leader, follower = (Sequence(i, (*prompt(100), 5000 + i), max_tokens=1) for i in range(2))
    model.scheduler.add(leader)
    model.scheduler.add(follower)
    model.step()
    assert leader.slot is not None
    model.cells[leader.slot].clear()
    model.scheduler.release(leader, forget=True)
    run(model)
    assert model.computed[1] == 101


def test_a_short_common_start_is_not_waited_for():
    model = fake(n_slots=2, n_batch=256, n_ctx=256)
    common = prompt(MIN_SHARED - 1)
    run(model, *(Sequence(i, (*common, 5000 + i), max_tokens=1) for i in range(2)))
    assert len(model.calls) == 1


def test_a_short_prefix_of_another_slot_is_not_worth_its_copy():
    model = fake(n_slots=2, n_copy_min=10)
    run(model, Sequence("long", prompt(30), max_tokens=1))
    short, own = Sequence("short", (*prompt(9), 0), max_tokens=1), Sequence("own", prompt(29), max_tokens=1)
    run(model, short)
    assert short.n_cached == 0
    run(model, own)
    assert own.n_cached == 28, "what its own slot holds costs no copy"
    other = Sequence("other", (*prompt(12), 0), max_tokens=1)
    run(model, other)
    assert other.n_cached == 12


def test_without_sharing_nothing_is_kept():
    model = fake(share_prefixes=False)
    run(model, Sequence("a", prompt(20), max_tokens=1))
    again = Sequence("b", prompt(20), max_tokens=1)
    run(model, again)
    assert again.n_cached == 0
    assert not any(slot.tokens for slot in model.scheduler.slots)


def test_under_a_window_only_what_reaches_to_the_end_of_a_slot_is_shared():
    model = fake(n_window=10, n_batch=64)
    run(model, Sequence("a", prompt(20), max_tokens=1))
    cut = Sequence("cut", (*prompt(15), 1, 2), max_tokens=1)
    run(model, cut)
    assert cut.n_cached == 0
    longer = Sequence("longer", (*prompt(20), 3), max_tokens=1)
    run(model, longer)
    assert longer.n_cached == 20


def test_under_a_window_a_slot_shorter_than_it_is_shared():
    model = fake(n_window=10, n_batch=64)
    run(model, Sequence("a", prompt(9), max_tokens=1))
    again = Sequence("b", prompt(9), max_tokens=1)
    run(model, again)
    assert again.n_cached == 8


def test_release_while_waiting_leaves_the_queue():
    model = fake(n_slots=1)
    first, second, third = (Sequence(i, prompt(3, start=i), max_tokens=2) for i in range(3))
    for sequence in (first, second, third):
        model.scheduler.add(sequence)
    model.step()
    model.scheduler.release(second)
    run(model)
    assert (len(first.written), len(second.written), len(third.written)) == (2, 0, 2)


def test_a_released_slot_keeps_its_tokens_unless_told_to_forget():
    scheduler = fake().scheduler
    model = FakeModel(scheduler, 8, 64)
    one, two = (Sequence(i, prompt(4, start=i), max_tokens=9) for i in range(2))
    scheduler.add(one)
    scheduler.add(two)
    model.step()
    slots = one.slot, two.slot
    scheduler.release(one)
    scheduler.release(two, forget=True)
    assert slots[0] is not None
    assert slots[1] is not None
    assert scheduler.slots[slots[0]].tokens
    assert not scheduler.slots[slots[1]].tokens
    assert scheduler.idle


def test_what_would_wait_beyond_the_free_slots_is_counted():
    scheduler = fake(n_slots=2).scheduler
    for i in range(3):
        assert scheduler.n_waiting_with(1) == max(0, i - 1)
        scheduler.add(Sequence(i, prompt(3, start=i), max_tokens=2))
    assert scheduler.n_waiting_with(0) == 1


@pytest.mark.parametrize("seed", range(40))
def test_random_traces_compute_every_token_once_and_in_order(seed):
    chance = random.Random(seed)
    n_ctx = 160
    model = fake(
        n_slots=chance.randint(1, 5),
        n_batch=chance.choice([5, 8, 33, 100]),
        n_ctx=n_ctx,
        share_prefixes=chance.random() < 0.8,
        n_window=chance.choice([0, 0, 0, 20]),
    )
    stems = [tuple(chance.randrange(3) for _ in range(chance.choice([1, 50, 90]))) for _ in range(3)]
    live: list[Sequence] = []
    cancelled: set[int] = set()
    admitted: list[object] = []
    sequences: list[Sequence] = []
    for turn in range(300):
        if turn < 200 and chance.random() < 0.3:
            tail = tuple(chance.randrange(3) for _ in range(chance.randint(1, 20)))
            tokens = chance.choice(stems) + tail
            sequence = Sequence(turn, tokens, max_tokens=chance.randint(1, min(30, n_ctx - len(tokens))))
            model.scheduler.add(sequence)
            live.append(sequence)
            sequences.append(sequence)
        if live and chance.random() < 0.1:
            victim = live.pop(chance.randrange(len(live)))
            slot = victim.slot
            forget = chance.random() < 0.3
            model.scheduler.release(victim, forget=forget)
            cancelled.add(id(victim))
            if slot is not None and (forget or not model.scheduler.share_prefixes):
                model.cells[slot].clear()
        for ended in model.step():
            live.remove(ended)
        for sequence in sequences:
            if (sequence.slot is not None or sequence.written) and sequence.id not in admitted:
                admitted.append(sequence.id)
    run(model)
    assert admitted == sorted(admitted), "first come, first admitted"
    for sequence in sequences:
        if id(sequence) in cancelled:
            continue
        assert len(sequence.written) == sequence.max_tokens
        expected = len(sequence.prompt) - sequence.n_cached + sequence.max_tokens - 1
        assert model.computed[sequence.id] == expected, "every token once"
