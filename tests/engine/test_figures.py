"""What an engine says of itself, against the fake model's own cells and what was asked of it."""

import random
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from engine.figures import Figures
from engine.luck import Luck
from engine.pace import Pace
from engine.request import Tenant
from engine.sequence import Sequence
from engine.stats import COUNTERS, N_STALL_BUCKETS, EngineStats, SlotStats
from tests.engine.fakes import FakeModel, fake, prompt, run

N_CTX, N_SLOTS = 64, 4


def snapshot(model: FakeModel, figures: Figures | None = None, **ages_s: float) -> EngineStats:
    n_cells = model.n_ctx * len(model.scheduler.slots) if model.n_cells is None else model.n_cells
    ages: dict[Hashable, float] = {**ages_s}
    context: Any = SimpleNamespace(n_ctx=n_cells)
    return (figures or Figures()).snapshot(model.scheduler, context, Luck(Pace()), ages)


def cells(stats: EngineStats) -> tuple[int, int, int, int]:
    return stats.kv_cells_used, stats.kv_cells_cached, stats.kv_cells_free, stats.kv_cells_shared


def there(model: FakeModel, n_cells: int) -> tuple[int, int, int, int]:
    """The same, counted cell by cell."""
    slots = model.scheduler.slots
    numbers = {index: [number for _, number in held] for index, held in model.slots.items()}
    holders = Counter(number for held in numbers.values() for number in held)
    running = {number for index, held in numbers.items() if slots[index].sequence for number in held}
    n_shared = sum(count > 1 for count in holders.values())
    return len(running), len(holders) - len(running), n_cells - len(holders), n_shared


def test_cells_that_sequences_share_count_once_and_those_of_idle_slots_as_cached():
    model = fake(n_ctx=1000, n_slots=4, n_cells=2000, n_batch=1000)
    run(model, Sequence("gone", prompt(600), max_tokens=3))
    for name in ("a", "b"):
        model.scheduler.add(Sequence(name, (*prompt(300), *prompt(20, start=ord(name))), max_tokens=9))
    model.step()
    model.step()  # the one goes on from what the other has computed
    stats = snapshot(model)
    assert stats.kv_cells_used + stats.kv_cells_cached + stats.kv_cells_free == 2000
    assert cells(stats) == there(model, 2000)
    assert stats.kv_cells_cached == 602 - 300, "what only the idle slot holds"
    assert stats.kv_cells_shared == 300


@pytest.mark.parametrize("n_cells", [None, 150])
@pytest.mark.parametrize("seed", range(10))
def test_cells_are_told_as_they_are_after_every_call(n_cells, seed):
    chance = random.Random(seed)
    model = fake(n_ctx=N_CTX, n_slots=N_SLOTS, n_cells=n_cells, n_batch=32, ram_bytes=200)
    waiting = [
        Sequence(id, prompt(chance.randint(1, 40), start=chance.randrange(2)), chance.randint(1, 20))
        for id in range(30)
    ]
    total = n_cells or N_CTX * N_SLOTS
    while waiting or not model.scheduler.idle:
        if waiting and chance.random() < 0.6:
            model.scheduler.add(waiting.pop())
        model.step()
        assert cells(snapshot(model)) == there(model, total)


def test_a_slot_is_told_by_what_its_request_does():
    model = fake(n_slots=4, n_batch=60, n_ctx=200)
    legal = (("legal", 0.5),)
    run(model, Sequence("old", prompt(40, start=1), max_tokens=1, adapters=legal))
    for name, first in (("again", prompt(40, start=1)), ("lead", prompt(90)), ("follow", prompt(90))):
        model.scheduler.add(Sequence(name, (*first, ord(name[0])), max_tokens=9, adapters=legal))
    model.step()
    told = Counter(snapshot(model, again=2.5, lead=1.0, follow=0.5).slots)
    assert told == Counter(
        [
            SlotStats("writing", 41, 40, legal, 2.5),
            SlotStats("prompt", 59, 0, legal, 1.0),
            SlotStats("following", 0, 0, legal, 0.5),
            SlotStats("idle", 0),
        ]
    )


def test_waiting_requests_are_told_by_priority_the_highest_first():
    model = fake(n_slots=1)
    assert snapshot(model).waiting_by_priority == ()
    for id, priority in enumerate((0, 0, -1, 3)):
        model.scheduler.add(Sequence(id, prompt(9), 9, tenant=Tenant(str(id), priority=priority)))
    assert snapshot(model).waiting_by_priority == ((3, 1), (0, 2), (-1, 1))
    model.step()
    assert snapshot(model).waiting_by_priority == ((0, 2), (-1, 1))


@pytest.mark.parametrize(
    ("budgets", "between", "tier"),
    [({}, (), "slot"), ({"ram_bytes": 999}, (1,), "ram"), ({"disk_bytes": 999}, (1,), "disk")],
)
def test_cached_tokens_are_counted_where_they_were(budgets, between, tier):
    counters = Figures().counters
    model = fake(n_slots=1, n_batch=999, n_ctx=999, **budgets)
    for start in (0, *between, 0):
        sequence = Sequence("id", prompt(100, start=start), max_tokens=1)
        run(model, sequence)
        counters.ended(sequence)
    n_requests = 2 + len(between)
    assert (counters.prompt_tokens_total, counters.completion_tokens_total) == (100 * n_requests, n_requests)
    found = {each: getattr(counters, f"cached_{each}_tokens_total") for each in ("slot", "ram", "disk")}
    assert found == {"slot": 0, "ram": 0, "disk": 0} | {tier: 99}
    assert counters.cached_tokens_total == 99


def test_what_a_leader_computed_for_a_request_was_in_a_slot():
    counters = Figures().counters
    model = fake(n_slots=2, n_batch=64, n_ctx=200)
    sequences = [Sequence(id, (*prompt(90), id), max_tokens=1) for id in range(2)]
    run(model, *sequences)
    for each in sequences:
        counters.ended(each)
    assert (counters.cached_tokens_total, counters.cached_slot_tokens_total) == (90, 90)


def test_the_prompt_of_a_request_that_was_never_let_in_is_no_miss():
    counters = Figures().counters
    counters.ended(Sequence("left the queue", prompt(90), max_tokens=1))
    assert counters.prompt_tokens_total == 0


def test_waits_are_counted_by_how_long_they_were():
    figures = Figures()
    for seconds in (0.004, 0.005, 0.03, 11.0):
        figures.waited(seconds)
    stats = snapshot(fake(), figures)
    assert stats.stall_counts == (2, 0, 0, 1, *[0] * (N_STALL_BUCKETS - 5), 1)
    assert stats.stall_s_total == pytest.approx(11.039)
    assert (stats.stall_p50_ms, stats.stall_max_ms) == (30.0, 11_000.0)


def test_counters_go_on_after_a_restart_and_nothing_else_does():
    grown = dict.fromkeys(COUNTERS, 2)
    past = replace(EngineStats(9, 9, 9, 9, 9, 9), **grown, stall_counts=(1,) * N_STALL_BUCKETS)
    now = replace(EngineStats(1, 1, 1, 1, 1, 1, kv_cells_free=1), **grown)
    doubled = dict.fromkeys(COUNTERS, 4)
    assert now.after(past) == replace(now, **doubled, stall_counts=(1,) * N_STALL_BUCKETS)
    assert now.after(None) is now


def test_every_figure_that_is_called_a_total_is_a_counter():
    totals = {name for name in EngineStats.__dataclass_fields__ if name.endswith("_total")}
    assert totals - {"restarts_total", "kv_cells_total"} == set(COUNTERS) - {"busy_s"}
