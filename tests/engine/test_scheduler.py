"""Scheduling, proven with a fake model whose next token is the last one plus one, in a small vocabulary."""

import pytest

from engine.holdings import MIN_SAVED, Costs
from engine.leaders import MIN_SHARED
from engine.request import Tenant
from engine.scheduler import MIN_MOVED, PATIENCE
from engine.sequence import Begin, Sequence
from engine.stash import State
from tests.engine.fakes import VOCABULARY, FakeModel, fake, prompt, run


def test_a_sequence_writes_last_plus_one_until_max_tokens():
    sequence = Sequence("a", (1, 2, 3), max_tokens=5)
    run(fake(), sequence)
    assert sequence.written == [4, 5, 6, 0, 1]


def test_a_long_prompt_is_computed_in_chunks_of_the_call_size():
    model = fake(n_batch=8)
    run(model, Sequence("a", prompt(20), max_tokens=1))
    assert [len(call[0].tokens) for call in model.calls] == [8, 8, 4]


def test_a_long_prompt_never_stops_those_that_write():
    model = fake(n_batch=8)
    writer = Sequence("writer", prompt(3), max_tokens=30)
    model.scheduler.add(writer)
    model.step()
    model.scheduler.add(Sequence("long", prompt(20, start=1), max_tokens=1))
    for _ in range(10):
        before = len(writer.written)
        model.step(n_prompt=2)
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


def test_followers_go_on_from_what_their_leader_saved_when_it_made_way():
    model = fake(n_slots=2, n_batch=16, n_ctx=256, ram_bytes=10**6)
    leader = Sequence("leader", (*prompt(200), 1), max_tokens=1)
    follower = Sequence("follower", (*prompt(200), 2), max_tokens=1, tenant=Tenant("mid", priority=1))
    urgent = Sequence("urgent", prompt(20, start=1), max_tokens=9, tenant=Tenant("high", priority=2))
    for each in (leader, follower, urgent):
        model.scheduler.add(each)
        for _ in range(4):
            model.step()
    assert leader.state is not None
    run(model)
    assert model.scheduler.n_preempted == 1
    assert sum(model.computed[each] for each in ("leader", "follower")) == 202


def test_followers_of_a_failed_leader_compute_it_all():
    model = fake(n_slots=2, n_batch=16, n_ctx=256)
    leader, follower = (Sequence(i, (*prompt(100), 5000 + i), max_tokens=1) for i in range(2))
    model.scheduler.add(leader)
    model.scheduler.add(follower)
    model.step()
    model.act(model.scheduler.release(leader, forget=True))
    run(model)
    assert model.computed[1] == 101


def test_who_waits_for_a_prompt_of_lower_priority_lends_it_its_own():
    model = fake(n_slots=4, n_batch=16, n_ctx=256)
    urgent = Tenant("urgent", priority=1)
    low = Sequence("low", (*prompt(100), 1), max_tokens=1)
    model.scheduler.add(low)
    model.step()
    follower = Sequence("follower", (*prompt(100), 2), max_tokens=1, tenant=urgent)
    model.scheduler.add(follower)
    for i in range(30):
        if len(model.scheduler.running) < 4:
            model.scheduler.add(Sequence(i, prompt(120, start=1 + i), max_tokens=1, tenant=urgent))
        model.step()
    assert follower.n_written == 1
    run(model)
    assert model.computed["follower"] == 1


def test_a_short_common_start_is_not_waited_for():
    model = fake(n_slots=2, n_batch=256, n_ctx=256)
    common = prompt(MIN_SHARED - 1)
    run(model, *(Sequence(i, (*common, 5000 + i), max_tokens=1) for i in range(2)))
    assert len(model.calls) == 1


def test_a_short_prefix_of_another_slot_is_not_worth_its_copy():
    model = fake(n_slots=2, n_batch=64, costs=Costs(copy=9))
    busy = Sequence("busy", prompt(30), max_tokens=30)
    model.scheduler.add(busy)
    for _ in range(4):
        model.step()
    for length, n_cached in ((20, 20), (9, 0)):
        each = Sequence(length, (*prompt(length), 0), max_tokens=1)
        model.scheduler.add(each)
        model.step()
        assert each.n_cached == n_cached
    run(model)
    own = Sequence("own", prompt(9), max_tokens=1)
    run(model, own)
    assert own.n_cached == 8, "an idle slot that is taken itself costs no copy"


def test_a_long_idle_slot_is_not_copied_for_a_short_prefix():
    model = fake(n_slots=3, n_batch=2000, n_ctx=2000, costs=Costs(copy=16, copied=0.01))
    run(model, Sequence("long", prompt(1500), max_tokens=1))
    for length, n_cached in ((20, 0), (60, 60)):
        each = Sequence(length, (*prompt(length), 0), max_tokens=1)
        run(model, each)
        assert each.n_cached == n_cached
    most = Sequence("most", (*prompt(800), 0), max_tokens=1)
    run(model, most)
    assert most.n_cached == 800
    assert sum(len(slot.tokens) > 800 for slot in model.scheduler.slots) == 1, "the slot itself is taken"


def test_the_slot_that_is_longest_unused_gives_way_not_the_one_admitted_first():
    model = fake(n_slots=3, n_batch=64)
    long = Sequence("long", prompt(10), max_tokens=20)
    model.scheduler.add(long)
    model.step()
    run(model, Sequence("short", prompt(10, start=1), max_tokens=1))
    third = Sequence("third", prompt(10, start=2), max_tokens=1)
    run(model, third)
    run(model, Sequence("new", prompt(10, start=3), max_tokens=1))
    held = [slot.tokens[0] for slot in model.scheduler.slots]
    assert sorted(held) == [VOCABULARY, VOCABULARY + 2, VOCABULARY + 3], "short made way"


def test_a_slot_that_lends_its_prefix_is_used():
    model = fake(n_slots=3, n_batch=64, costs=Costs(copy=2))
    for start in range(6):
        run(model, Sequence(start, prompt(40, start=start), max_tokens=1))
    borrower = Sequence("borrower", (*prompt(10, start=3), 0), max_tokens=1)
    run(model, borrower)
    assert borrower.n_cached == 10
    run(model, Sequence("new", prompt(10, start=9), max_tokens=1))
    held = {slot.tokens[0] for slot in model.scheduler.slots}
    assert held == {VOCABULARY + 3, VOCABULARY + 9}, "the lender outlives who was used after it was written"


def test_without_sharing_nothing_is_kept():
    model = fake(share_prefixes=False)
    run(model, Sequence("a", prompt(20), max_tokens=1))
    again = Sequence("b", prompt(20), max_tokens=1)
    run(model, again)
    assert again.n_cached == 0
    assert not any(slot.tokens for slot in model.scheduler.slots)


def test_under_a_window_only_the_whole_of_what_a_slot_holds_is_copied():
    model = fake(n_window=10, n_batch=64)
    busy = Sequence("a", prompt(20), max_tokens=30)
    model.scheduler.add(busy)
    model.step()
    cut = Sequence("cut", (*prompt(15), 1, 2), max_tokens=1)
    model.scheduler.add(cut)
    model.step()
    assert cut.n_cached == 0
    longer = Sequence("longer", (*busy.tokens[:-1], 99, 3), max_tokens=1)
    model.scheduler.add(longer)
    model.step()
    assert longer.n_cached == len(longer.prompt) - 2
    run(model)


def test_under_a_window_an_idle_slot_is_cut_where_it_computed():
    model = fake(n_slots=1, n_window=10, n_batch=64)
    run(model, Sequence("a", prompt(40), max_tokens=1))
    for length in (35, 12):  # far less than half: it cannot be copied, so it is taken
        cut = Sequence(length, (*prompt(length), 1, 2), max_tokens=1)
        run(model, cut)
        assert cut.n_cached == length


def test_under_a_window_what_was_copied_is_not_cut_shorter():
    model = fake(n_window=10, n_batch=64)
    busy = Sequence("busy", prompt(30), max_tokens=30)
    model.scheduler.add(busy)
    model.step()
    copy = Sequence("copy", (*prompt(30), 1), max_tokens=1)
    model.scheduler.add(copy)
    model.step()
    assert copy.n_cached == 30
    for length, n_cached in ((30, 30), (29, 0)):
        cut = Sequence(length, (*prompt(length), 2, 3), max_tokens=1)
        model.scheduler.add(cut)
        model.step()
        assert cut.n_cached == n_cached
    run(model)


@pytest.mark.parametrize("n_cells", [None, 4000])
def test_under_a_window_prompts_that_arrive_together_compute_their_common_part_once(n_cells):
    model = fake(
        n_slots=8, n_batch=64, n_ctx=400, n_window=20, n_cells=n_cells, costs=Costs(copy=16, copied=0.01)
    )
    first = [
        Sequence(i, (*prompt(150), *range(5000 + 60 * i, 5060 + 60 * i)), max_tokens=30) for i in range(8)
    ]
    run(model, *first)
    assert sum(model.computed.values()) == 150 + 8 * (60 + 29)
    if n_cells is None:
        second = [Sequence(i, (*prompt(150), 4000 + i), max_tokens=2) for i in range(8, 16)]
        run(model, *second)
        assert [each.n_cached for each in second] == [150] * 8, "each slot is cut where it began"


def test_under_a_window_a_leader_waits_for_followers_at_each_place_where_they_leave_it():
    model = fake(n_slots=4, n_batch=64, n_ctx=400, n_window=20)
    run(model, *(Sequence(i, (*prompt(100 + 50 * i), 5000 + i), max_tokens=2) for i in reversed(range(4))))
    assert sum(model.computed.values()) == 250 + 4 * 2


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
    model = FakeModel(scheduler, 64)
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


# Who goes first, and who makes way


def written_together(model, sequences, steps: int) -> dict[str, int]:
    for each in sequences:
        model.scheduler.add(each)
    for _ in range(steps):
        model.step()
    model.check_books()
    counts: dict[str, int] = {}
    for each in sequences:
        counts[each.tenant.name] = counts.get(each.tenant.name, 0) + each.n_written
    return counts


def test_tenants_get_tokens_by_weight_when_all_want_more():
    model = fake(n_slots=4, n_batch=64, ram_bytes=10**6)
    heavy, light = Tenant("heavy", weight=3.0), Tenant("light")
    sequences = [
        Sequence(i, prompt(5, start=i), max_tokens=10 + i % 7, tenant=heavy if i % 2 else light)
        for i in range(200)
    ]
    counts = written_together(model, sequences, 300)
    assert 2.7 <= counts["heavy"] / counts["light"] <= 3.3


def test_a_flood_makes_way_for_who_comes_with_one_request():
    model = fake(n_slots=3, n_batch=64, ram_bytes=10**6)
    flood = [Sequence(i, prompt(5, start=i), max_tokens=40, tenant=Tenant("flood")) for i in range(6)]
    written_together(model, flood, 5)
    guest = Sequence("guest", prompt(5, start=90), max_tokens=3, tenant=Tenant("guest"))
    model.scheduler.add(guest)
    model.step()
    assert guest.n_written == 1
    assert flood[2].slot is None, "the youngest of the flood made way"
    run(model)
    assert [each.n_written for each in flood] == [40] * 6
    assert flood[2].written == [(flood[2].prompt[-1] + 1 + i) % VOCABULARY for i in range(40)]


def test_tenants_within_their_share_do_not_make_way():
    model = fake(n_slots=2, n_batch=64)
    sequences = [Sequence(i, prompt(5, start=i), max_tokens=30, tenant=Tenant(str(i))) for i in range(5)]
    written_together(model, sequences, 20)
    assert model.scheduler.n_preempted == 0
    run(model)


def test_admission_asks_for_shares_in_proportion_to_tenants_and_slots(monkeypatch):
    model = fake(n_slots=8, n_batch=64)
    for i in range(60):
        model.scheduler.add(Sequence(i, prompt(5, start=i), max_tokens=30, tenant=Tenant(str(i))))
    model.step()
    asked = []
    share = model.scheduler.queue.share
    monkeypatch.setattr(model.scheduler.queue, "share", lambda *given: asked.append(given) or share(*given))
    model.scheduler.admit()
    assert 0 < len(asked) < 2 * (60 + 8)


def test_priority_takes_a_slot_at_once_and_gives_it_back():
    model = fake(n_slots=1, ram_bytes=10**6, n_batch=128, n_ctx=256)
    low = Sequence("low", prompt(MIN_SAVED), max_tokens=20)
    model.scheduler.add(low)
    model.step()
    high = Sequence("high", prompt(5, start=1), max_tokens=2, tenant=Tenant("urgent", priority=1))
    model.scheduler.add(high)
    model.step()
    assert (low.slot, high.slot) == (None, 0)
    run(model)
    assert model.computed["low"] == MIN_SAVED + 19, "what was computed was saved and came back"


def test_without_room_to_save_one_that_made_way_computes_again():
    model = fake(n_slots=1, n_batch=128, n_ctx=256)
    low = Sequence("low", prompt(MIN_SAVED), max_tokens=20)
    model.scheduler.add(low)
    model.step()
    model.scheduler.add(
        Sequence("high", prompt(5, start=1), max_tokens=2, tenant=Tenant("urgent", priority=1))
    )
    run(model)
    assert low.n_written == 20
    assert model.computed["low"] == MIN_SAVED + MIN_SAVED + 1 + 18


def test_a_flood_in_the_queue_leaves_others_their_share_of_it():
    scheduler = fake(n_slots=1).scheduler
    flood, guest = Tenant("flood"), Tenant("guest")
    for i in range(9):
        assert not scheduler.is_full_for(flood, 8)
        scheduler.add(Sequence(i, prompt(3, start=i), max_tokens=2, tenant=flood))
    assert scheduler.is_full_for(flood, 8)
    for i in range(4):
        assert not scheduler.is_full_for(guest, 8)
        scheduler.add(Sequence(f"guest {i}", prompt(3, start=i), max_tokens=2, tenant=guest))
    assert scheduler.is_full_for(guest, 8)
    assert scheduler.is_full_for(flood, 8)


# Memory that all share


def test_short_memory_serves_all_the_same():
    model = fake(n_slots=8, n_batch=32, n_ctx=200, n_cells=220, ram_bytes=10**6)
    sequences = [Sequence(i, prompt(70, start=i), max_tokens=60) for i in range(8)]
    run(model, *sequences)
    assert all(each.n_written == 60 for each in sequences)
    assert model.scheduler.n_preempted > 0
    assert max(model.computed.values()) < 70 + 60 + MIN_MOVED, "what was much was not computed twice"


def test_a_shared_prefix_takes_its_cells_once():
    model = fake(n_slots=4, n_batch=256, n_ctx=200, n_cells=200)
    run(model, *(Sequence(i, (*prompt(100), 5000 + i), max_tokens=10) for i in range(4)))
    assert model.scheduler.n_preempted == 0
    assert sum(model.computed.values()) == 100 + 4 * 10


def test_idle_slots_give_way_before_anybody_who_runs():
    model = fake(n_slots=2, n_batch=256, n_ctx=200, n_cells=200)
    run(model, Sequence("old", prompt(150), max_tokens=1))
    run(model, Sequence("new", prompt(150, start=1), max_tokens=40))
    assert model.scheduler.n_preempted == 0


def test_idle_prefixes_stay_when_all_of_them_would_not_do():
    model = fake(n_slots=4, n_batch=512, n_ctx=400, n_cells=400)
    run(model, Sequence("old", prompt(100), max_tokens=1))
    busy = Sequence("busy", prompt(150, start=1), max_tokens=40)
    model.scheduler.add(busy)
    model.step()
    model.scheduler.add(Sequence("large", prompt(300, start=2), max_tokens=1))
    model.step()
    assert len(model.scheduler.queue) == 1
    assert sorted(len(slot.tokens) for slot in model.scheduler.slots) == [0, 0, 100, 151]
    run(model)


def test_one_that_fills_the_whole_memory_gets_there():
    model = fake(n_slots=3, n_batch=64, n_ctx=200, n_cells=200, ram_bytes=10**6)
    long = Sequence("long", prompt(100), max_tokens=100)
    run(
        model,
        Sequence("a", prompt(60, start=1), max_tokens=30),
        long,
        Sequence("b", prompt(60, start=2), max_tokens=30),
    )
    assert long.n_written == 100


def in_short_memory(*lengths: int) -> tuple[FakeModel, list[Sequence]]:
    """1,000 cells, and running requests of low priority that have computed so much."""
    model = fake(n_slots=4, n_batch=1000, n_ctx=1000, n_cells=1000, ram_bytes=10**6)
    low = [Sequence(i, prompt(length, start=i), max_tokens=20) for i, length in enumerate(lengths)]
    for each in low:
        model.scheduler.add(each)
    model.step()
    return model, low


def urgently(length: int) -> Sequence:
    return Sequence("urgent", prompt(length, start=9), max_tokens=2, tenant=Tenant("urgent", priority=1))


def test_priority_takes_cells_even_if_a_slot_is_free():
    model, (low,) = in_short_memory(700)
    urgent = urgently(450)
    model.scheduler.add(urgent)
    model.step()
    assert (low.slot, urgent.n_written) == (None, 1)
    run(model)
    assert model.computed[low.id] == 700 + 19


def test_as_many_make_way_as_it_takes():
    model, low = in_short_memory(400, 300, 200)
    urgent = urgently(400)
    model.scheduler.add(urgent)
    model.step()
    assert [each.slot is None for each in low] == [False, True, True], "the youngest"
    assert urgent.n_written == 1
    run(model)


def test_nobody_makes_way_for_what_would_not_fit_all_the_same():
    model, low = in_short_memory(50, 50)
    first = Sequence("first", prompt(600, start=5), max_tokens=20, tenant=Tenant("urgent", priority=1))
    second = Sequence("second", prompt(50, start=6), max_tokens=20, tenant=Tenant("urgent", priority=1))
    for each in (first, second):
        model.scheduler.add(each)
    model.step()
    assert len(model.scheduler.running) == 4
    model.scheduler.add(urgently(450))
    model.step()
    assert model.scheduler.n_preempted == 0
    run(model)
    assert all(each.n_written == 20 for each in low)


def test_what_others_have_yet_to_read_is_reckoned_with():
    model = fake(n_slots=8, n_batch=64, n_ctx=1000, n_cells=1000)
    run(model, *(Sequence(i, prompt(400, start=i), max_tokens=50) for i in range(8)))
    assert model.scheduler.n_preempted == 0
    assert sum(model.computed.values()) == 8 * (400 + 49)


# Prefixes outside of the slots


def test_what_a_slot_gives_up_comes_back_from_memory():
    model = fake(n_slots=1, n_batch=256, n_ctx=256, ram_bytes=10**6)
    run(model, Sequence("a", prompt(100), max_tokens=1))
    run(model, Sequence("b", prompt(100, start=1), max_tokens=1))
    again = Sequence("again", (*prompt(100), 7), max_tokens=1)
    run(model, again)
    assert again.n_cached == 100
    assert model.computed["again"] == 1


def test_without_memory_for_states_they_go_to_disk():
    model = fake(n_slots=1, n_batch=256, n_ctx=256, disk_bytes=10**6)
    run(model, Sequence("a", prompt(100), max_tokens=1))
    run(model, Sequence("b", prompt(100, start=1), max_tokens=1))
    again = Sequence("again", (*prompt(100), 7), max_tokens=1)
    run(model, again)
    assert again.n_cached == 100


def test_a_state_comes_back_whole_before_it_is_cut():
    model = fake(n_slots=3, n_batch=1000, n_ctx=1000, n_cells=1000, ram_bytes=10**6)
    run(model, Sequence("long", prompt(900), max_tokens=1))
    run(model, Sequence("other", prompt(950, start=1), max_tokens=1))
    assert [len(tokens) for tokens in model.states.values()] == [900]
    busy = Sequence("busy", prompt(450, start=2), max_tokens=60)
    model.scheduler.add(busy)
    model.step()
    part = Sequence("part", (*prompt(200), 7), max_tokens=1)
    model.scheduler.add(part)
    model.step()
    assert (part.n_written, part.n_cached) == (1, 0), "it does not wait for that"
    run(model)
    whole = Sequence("whole", (*prompt(900), 7), max_tokens=1)
    run(model, whole)
    assert whole.n_cached == 900


def test_the_end_leaves_prefixes_for_the_next_process():
    model = fake(n_slots=2, n_batch=256, n_ctx=256, ram_bytes=10**6, disk_bytes=10**6)
    run(model, Sequence("a", prompt(100), max_tokens=1))
    model.act(model.scheduler.retire())
    (left,) = model.states
    assert left.tier == "disk"
    later = fake(n_slots=2, n_batch=256, n_ctx=256, ram_bytes=10**6, disk_bytes=10**6)
    found = State(left.tokens, left.namespace, left.size_bytes, tier="disk")
    later.states[found] = found.tokens
    later.act(later.scheduler.adopt([found]))
    again = Sequence("again", (*prompt(100), 7), max_tokens=1)
    run(later, again)
    assert again.n_cached == 100


def backed_up(model) -> list[int]:
    """Let it rest until nothing is left to do; the lengths of what is on disk then."""
    for _ in range(20):
        actions = model.scheduler.back_up()
        if not actions:
            model.check_books()
            return sorted(state.length for state in model.states if "disk" in state.tiers)
        model.act(actions)
    raise AssertionError("it never rests")


def test_while_nobody_asks_slots_and_saved_states_are_copied_to_disk_once():
    model = fake(n_slots=2, n_batch=256, n_ctx=256, ram_bytes=10**6, disk_bytes=10**6)
    for start in range(3):
        run(model, Sequence(start, prompt(100 + start, start=start), max_tokens=1))
    assert [state.tier for state in model.states] == ["ram"]
    assert backed_up(model) == [100, 101, 102]
    assert model.scheduler.back_up() == []
    assert model.scheduler.held.stash.used == {"ram": 100, "disk": 303}


def test_a_conversation_is_written_again_when_much_is_new_and_replaces_what_it_went_on_from():
    model = fake(n_slots=1, n_batch=1000, n_ctx=1000, disk_bytes=10**6)
    for n_tokens, on_disk in ((300, [300]), (350, [300]), (390, [300]), (401, [401])):
        run(model, Sequence(n_tokens, prompt(n_tokens), max_tokens=1))
        assert backed_up(model) == on_disk


def test_without_a_disk_budget_or_room_nothing_is_written():
    for disk_bytes in (0, 99):
        model = fake(n_slots=1, n_batch=256, n_ctx=256, ram_bytes=10**6, disk_bytes=disk_bytes)
        run(model, Sequence("a", prompt(100), max_tokens=1))
        assert backed_up(model) == []


def test_the_end_leaves_what_two_slots_share():
    model = fake(n_slots=2, n_batch=256, n_ctx=256, ram_bytes=10**6, disk_bytes=10**6)
    run(model, *(Sequence(tail, (*prompt(100), tail), max_tokens=1) for tail in (7, 8)))
    model.act(model.scheduler.retire())
    assert [state.length for state in model.states] == [101]


def test_what_did_not_come_is_computed():
    model = fake(n_slots=1, n_batch=256, n_ctx=256, ram_bytes=10**6)
    run(model, Sequence("a", prompt(100), max_tokens=1))
    run(model, Sequence("b", prompt(100, start=1), max_tokens=1))
    again = Sequence("again", (*prompt(100), 7), max_tokens=3)
    model.scheduler.add(again)
    actions = model.scheduler.admit()
    model.act(actions)
    (begin,) = (each for each in actions if isinstance(each, Begin))
    assert isinstance(begin.source, State)
    model.act(model.scheduler.lost(begin))
    assert begin.source not in model.states, "it would be believed in again"
    run(model)
    assert again.n_cached == 0
    assert model.computed["again"] == 101 + 2
    run(model, Sequence("c", prompt(100, start=2), max_tokens=1))
    assert again.tokens[:103] in model.states.values(), "what it computed is saved"


# Adapters and guesses


def test_adapters_take_turns_and_nobody_starves():
    model = fake(n_slots=4, n_batch=64)
    sequences = [
        Sequence(i, prompt(5, start=i), max_tokens=12, namespace=name, adapters=name)
        for i, name in enumerate(["", "a", "a", "b"])
    ]
    written_together(model, sequences, 12)
    assert [each.n_written for each in sequences] == [4] * 4
    run(model)


def test_adapters_that_come_and_go_do_not_push_in():
    model = fake(n_slots=3, n_batch=64)
    stays = Sequence("stays", prompt(5), max_tokens=30, adapters="a")
    model.scheduler.add(stays)
    turns = []
    for turn in range(60):
        if len(model.scheduler.queue) < 3:
            name = "bc"[turn % 2]
            model.scheduler.add(Sequence(turn, prompt(3, start=turn), max_tokens=1, adapters=name))
        model.step()
        turns.append(model.calls[-1][0].sequence.adapters)
    longest = max(len(others) for others in "".join(turns).split("a"))
    assert longest <= 2, "two others are between two turns at most"


def test_who_writes_holds_up_the_prompts_of_other_adapters_too():
    model = fake(n_slots=2, n_batch=64)
    writer = Sequence("writer", prompt(5), max_tokens=30, adapters="a")
    model.scheduler.add(writer)
    model.step()
    model.scheduler.add(Sequence("long", prompt(40, start=1), max_tokens=1, adapters="b"))
    for _ in range(8):
        model.step(n_prompt=5)
        assert all(len(chunk.tokens) <= 6 for chunk in model.calls[-1])
    model.scheduler.release(writer)
    model.step(n_prompt=5)
    assert len(model.calls[-1][0].tokens) > 6, "now nobody waits for the call's end"


def test_right_guesses_are_written_in_one_call_and_wrong_ones_leave_no_trace():
    model = fake(n_batch=64)
    sequence = Sequence("a", (1, 2), max_tokens=9)
    model.scheduler.add(sequence)
    model.step()
    model.step(drafts={sequence: [4, 5, 6]})
    assert sequence.written == [3, 4, 5, 6, 0]
    model.step(drafts={sequence: [1, 9, 3]})
    assert sequence.written == [3, 4, 5, 6, 0, 1, 2]
    model.check_books()
    run(model)
    assert sequence.n_written == 9


def test_guesses_never_write_more_than_was_asked_for():
    model = fake(n_batch=64)
    sequence = Sequence("a", (1,), max_tokens=3)
    model.scheduler.add(sequence)
    model.step()
    (ended,) = model.step(drafts={sequence: [3, 4, 5, 6, 0]})
    assert ended.written == [2, 3, 4]
    assert model.calls[-1][0].n_draft == 1


def test_running_sequences_close_ranks_when_one_between_them_ends():
    model = fake(n_slots=6, n_batch=64)
    lengths = [40, 3, 40, 3, 40]
    sequences = [Sequence(i, prompt(5, start=i), max_tokens=n) for i, n in enumerate(lengths)]
    for sequence in sequences:
        model.scheduler.add(sequence)
    for _ in range(3):
        model.step()
    assert [each.slot for each in model.scheduler.running] == [0, 2, 4], "nobody moves at once"
    for _ in range(PATIENCE + 1):
        model.step()
    assert sorted(each.slot for each in model.scheduler.running) in ([1, 2, 3], [2, 3, 4])
    late = Sequence("late", prompt(5, start=9), max_tokens=2)
    model.scheduler.add(late)
    model.step()
    slots = [each.slot for each in model.scheduler.running]
    assert slots == list(range(slots[0], slots[0] + 4)), "a new one goes next to them"
    while not model.scheduler.idle:
        model.step()
    for sequence, length in zip(sequences, lengths, strict=True):
        first = sequence.prompt[-1]
        assert sequence.written == [(first + 1 + i) % VOCABULARY for i in range(length)]


def test_in_a_unified_memory_nobody_moves():
    model = fake(n_slots=3, n_batch=64, n_cells=300)
    for i, n in enumerate([40, 3, 40]):
        model.scheduler.add(Sequence(i, prompt(5, start=i), max_tokens=n))
    for _ in range(3 + PATIENCE + 3):
        model.step()
    assert [each.slot for each in model.scheduler.running] == [0, 2]
