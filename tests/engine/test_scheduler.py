"""Scheduling, proven with a fake model whose next token is the last one plus 1."""

import random
from dataclasses import dataclass, field

import pytest

from engine.scheduler import Scheduler, Sequence


@dataclass
class FakeEngine:
    """The loop's part: carries out what the scheduler decides, on a memory that checks every step."""

    scheduler: Scheduler
    cells: dict[int, list[int]] = field(default_factory=dict)  # slot -> tokens at positions 0, 1, ...
    batches: list[list[tuple[object, int]]] = field(default_factory=list)  # per call: (id, tokens)

    def step(self) -> list[tuple[object, int]]:
        """One call; (id, token) of everything that was written."""
        for admission in self.scheduler.admit():
            slot = admission.sequence.slot
            self.cells[slot] = list(self.cells.get(admission.source, [])[: admission.length])
        plan = self.scheduler.plan()
        self.batches.append([(chunk.sequence.id, len(chunk.tokens)) for chunk in plan])
        written = []
        for chunk in plan:
            cells = self.cells[chunk.sequence.slot]
            assert len(cells) == chunk.start, "a chunk must continue exactly where the cells end"
            cells += chunk.tokens
            self.scheduler.computed(chunk)
            if chunk.samples:
                token = cells[-1] + 1
                written.append((chunk.sequence.id, token))
                if not self.scheduler.wrote(chunk.sequence, token):
                    self.scheduler.release(chunk.sequence)
        return written

    def run(self) -> dict[object, list[int]]:
        """Until idle: what each request wrote."""
        results: dict[object, list[int]] = {}
        while not self.scheduler.idle:
            for id, token in self.step():
                results.setdefault(id, []).append(token)
        return results


def engine(n_slots: int = 4, n_batch: int = 8, **options) -> FakeEngine:
    return FakeEngine(Scheduler(n_slots=n_slots, n_batch=n_batch, **options))


def test_every_request_writes_the_tokens_that_follow_its_own_prompt():
    fake = engine()
    for id in range(10):
        fake.scheduler.add(Sequence(id, tuple(range(100 * id, 100 * id + 5 + id)), max_tokens=3 + id))
    results = fake.run()
    for id in range(10):
        last = 100 * id + 4 + id
        assert results[id] == [last + n for n in range(1, 4 + id)]


def test_requests_are_admitted_in_order_of_arrival():
    fake = engine(n_slots=2)
    for id in range(5):
        fake.scheduler.add(Sequence(id, (id,), max_tokens=1))
    fake.step()
    assert [id for id, _ in fake.batches[0]] == [0, 1]
    fake.step()
    assert [id for id, _ in fake.batches[1]] == [2, 3]


def test_a_long_prompt_never_keeps_running_sequences_from_their_token():
    fake = engine(n_slots=3, n_batch=8, n_shared_chunk=2)
    fake.scheduler.add(Sequence("a", (1,), max_tokens=100))
    fake.scheduler.add(Sequence("b", (2,), max_tokens=100))
    fake.step()
    fake.scheduler.add(Sequence("long", tuple(range(50, 90)), max_tokens=1))
    while fake.scheduler.slots[2].sequence is not None or fake.scheduler.waiting:
        written = fake.step()
        assert {"a", "b"} <= {id for id, _ in written}
    assert all(dict(batch).get("long", 0) <= 2 for batch in fake.batches)


def test_a_prompt_alone_fills_whole_calls():
    fake = engine(n_batch=8)
    fake.scheduler.add(Sequence(0, tuple(range(20)), max_tokens=1))
    fake.run()
    assert [dict(batch)[0] for batch in fake.batches] == [8, 8, 4]


def test_a_call_never_holds_more_tokens_than_its_size():
    fake = engine(n_slots=8, n_batch=8)
    for id in range(20):
        fake.scheduler.add(Sequence(id, tuple(range(id, 2 * id + 1)), max_tokens=5))
    fake.run()
    assert max(sum(n for _, n in batch) for batch in fake.batches) <= 8


def test_slot_order_is_the_same_from_call_to_call():
    fake = engine(n_slots=4)
    for id in range(4):
        fake.scheduler.add(Sequence(id, (id,), max_tokens=10))
    fake.run()
    assert {tuple(id for id, _ in batch) for batch in fake.batches} == {(0, 1, 2, 3)}


def test_a_later_request_starts_from_the_prefix_of_a_finished_one():
    fake = engine()
    fake.scheduler.add(Sequence("first", (1, 2, 3, 4, 5), max_tokens=2))
    fake.run()
    later = Sequence("later", (1, 2, 3, 4, 5, 6, 70), max_tokens=1)
    fake.scheduler.add(later)
    assert fake.run()["later"] == [71]
    assert later.n_cached == 6  # the prompt and the token that was decoded after it


def test_a_prefix_is_shared_from_a_busy_slot_too():
    fake = engine(n_batch=32)
    fake.scheduler.add(Sequence("busy", tuple(range(10)), max_tokens=50))
    fake.step()
    second = Sequence("second", (*range(8), 99), max_tokens=1)
    fake.scheduler.add(second)
    fake.step()
    assert second.n_cached == 8
    assert second.written == [100]


def test_the_last_prompt_token_is_always_computed_because_its_logits_are_needed():
    fake = engine()
    for id in ("one", "two"):
        sequence = Sequence(id, (1, 2, 3), max_tokens=1)
        fake.scheduler.add(sequence)
        assert fake.run()[id] == [4]
    assert sequence.n_cached == 2


def test_without_sharing_every_prompt_is_computed_whole():
    fake = engine(share_prefixes=False)
    for id in ("one", "two"):
        sequence = Sequence(id, (1, 2, 3), max_tokens=1)
        fake.scheduler.add(sequence)
        fake.run()
    assert sequence.n_cached == 0


def test_a_useful_cache_is_not_overwritten_while_another_slot_is_empty():
    fake = engine(n_slots=2)
    fake.scheduler.add(Sequence("long", tuple(range(30)), max_tokens=1))
    fake.run()
    fake.scheduler.add(Sequence("short", (0, 1, 77), max_tokens=1))
    fake.run()
    again = Sequence("again", (*range(30), 99), max_tokens=1)
    fake.scheduler.add(again)
    fake.run()
    assert again.n_cached == 30


def test_releasing_a_waiting_request_leaves_the_running_ones_alone():
    fake = engine(n_slots=1)
    fake.scheduler.add(Sequence("runs", (1,), max_tokens=3))
    waits = Sequence("waits", (5,), max_tokens=3)
    fake.scheduler.add(waits)
    fake.step()
    fake.scheduler.release(waits)
    assert fake.run() == {"runs": [3, 4]}


def test_a_forgotten_slot_lends_no_prefix():
    fake = engine(n_slots=1)
    bad = Sequence("bad", (1, 2, 3), max_tokens=9)
    fake.scheduler.add(bad)
    fake.step()
    fake.scheduler.release(bad, forget=True)
    fake.cells.clear()
    good = Sequence("good", (1, 2, 3), max_tokens=1)
    fake.scheduler.add(good)
    assert fake.run()["good"] == [4]
    assert good.n_cached == 0


@pytest.mark.parametrize("seed", range(300))
def test_random_traces_keep_every_answer_and_every_cell_right(seed):
    random_ = random.Random(seed)
    fake = engine(n_slots=random_.randint(1, 5), n_batch=random_.randint(5, 12))
    results: dict[object, list[int]] = {}
    sequences: dict[int, Sequence] = {}
    cancelled = set()
    for id in range(random_.randint(1, 25)):
        prefix = tuple(range(random_.randint(0, 12)))
        own = tuple(random_.randint(0, 3) for _ in range(random_.randint(1, 9)))
        sequences[id] = Sequence(id, prefix + own, max_tokens=random_.randint(1, 9))
        fake.scheduler.add(sequences[id])
        for _ in range(random_.randint(0, 4)):
            for done, token in fake.step():
                results.setdefault(done, []).append(token)
        victim = random_.choice(list(sequences.values()))
        if random_.random() < 0.2 and (victim in fake.scheduler.waiting or victim.slot is not None):
            fake.scheduler.release(victim)
            cancelled.add(victim.id)
    for id, tokens in fake.run().items():
        results.setdefault(id, []).extend(tokens)
    for id, sequence in sequences.items():
        last = sequence.prompt[-1]
        whole = [last + n for n in range(1, sequence.max_tokens + 1)]
        written = results.get(id, [])
        assert written == whole[: len(written)] if id in cancelled else written == whole
    for index, slot in enumerate(fake.scheduler.slots):
        assert slot.tokens == fake.cells.get(index, [])
