"""Which prefixes give way: by last use, and by what it takes to compute again what nobody else holds."""

import pytest

from engine.holdings import Costs
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.stash import State
from tests.engine.fakes import VOCABULARY, FakeModel, fake, prompt, run


def alone(model: FakeModel, length: int, start: int, *, tail: tuple[int, ...] = ()) -> Sequence:
    """Run a request of so many tokens with nobody beside it."""
    sequence = Sequence((length, start, tail), (*prompt(length, start=start), *tail), max_tokens=1)
    run(model, sequence)
    return sequence


def saved(model: FakeModel, tier: str | None = None) -> list[tuple[int, int]]:
    """The saved states, as their lengths and whose they are."""
    states = [state for state in model.states if tier in (None, state.tier)]
    return sorted((state.length, state.tokens[0] - VOCABULARY) for state in states)


def one_slot(**options) -> FakeModel:
    return fake(n_slots=1, n_batch=4096, n_ctx=4096, **options)


def test_a_long_prefix_that_comes_later_outlives_short_ones_unused_for_longer():
    model = one_slot(ram_bytes=2000 + 81 + 80)
    alone(model, 81, 0)
    alone(model, 81, 1)
    alone(model, 2000, 2)
    alone(model, 10, 3)  # takes the slot from it
    assert saved(model) == [(81, 1), (2000, 2)], "the longest unused went, not the dearest"
    assert alone(model, 2000, 2, tail=(5,)).n_cached == 2000


def test_the_same_holds_when_memory_moves_states_to_disk():
    model = one_slot(ram_bytes=2000 + 81 + 80, disk_bytes=10**5)
    alone(model, 81, 0)
    alone(model, 81, 1)
    alone(model, 2000, 2)
    alone(model, 10, 3)
    assert saved(model, "disk") == [(81, 0)]
    assert saved(model, "ram") == [(81, 1), (2000, 2)]


def test_a_full_disk_throws_the_longest_unused_away_first():
    model = one_slot(disk_bytes=300)
    for start in range(4):
        alone(model, 100, start)
    alone(model, 10, 4)
    assert saved(model) == [(100, 1), (100, 2), (100, 3)]


@pytest.mark.parametrize("disk", [0, 10**5])
def test_what_a_longer_state_holds_too_goes_first_and_to_no_disk(disk):
    model = one_slot(ram_bytes=100 + 300 + 100 - 1, disk_bytes=disk)
    alone(model, 100, 0)
    alone(model, 10, 8)  # the first hundred tokens are saved, and once more with what follows them
    long = Sequence("long", (*prompt(100), *range(5000, 5200)), max_tokens=1)
    run(model, long)
    alone(model, 100, 1)
    alone(model, 10, 9)
    assert saved(model) == [(100, 1), (300, 0)]
    again = Sequence("again", (*prompt(100), 3), max_tokens=1)
    run(model, again)
    assert again.n_cached == 100


def test_what_two_held_is_dear_again_once_one_of_them_is_gone():
    """Two states with a long common prefix: the loser costs little, and then the other costs it all."""
    model = one_slot(ram_bytes=1000 + 80 + 1000 + 80)
    first = Sequence("first", (*prompt(1000), *range(5000, 5080)), max_tokens=1)
    second = Sequence("second", (*prompt(1000), *range(6000, 6080)), max_tokens=1)
    run(model, first)
    run(model, second)  # takes the slot, and with it the common part
    alone(model, 200, 1)
    assert saved(model) == [(1080, 0), (1080, 0)]
    alone(model, 200, 2)
    assert saved(model) == [(200, 1), (1080, 0)], "one of the two, of which the other holds most"
    for start in range(3, 7):
        alone(model, 200, start)
    assert (1080, 0) in saved(model), "the other is worth its bytes"


def test_a_slot_that_keeps_the_start_of_what_is_saved_lets_the_state_go_first():
    """What is taken in place is cut: only what is cut off is the state's alone."""
    model = one_slot(ram_bytes=400 + 100 - 1)
    alone(model, 100, 1)
    alone(model, 400, 0)  # saves the hundred
    half = Sequence("half", (*prompt(320), 1), max_tokens=1)
    run(model, half)  # saves the 400, of which the slot goes on holding 320
    assert saved(model) == [(100, 1)]


def test_the_end_keeps_what_is_dear():
    model = fake(n_slots=3, n_batch=4096, n_ctx=4096, ram_bytes=10**5, disk_bytes=1000 + 90 + 50)
    for length, start in ((100, 1), (1000, 0), (90, 2)):
        alone(model, length, start)
    model.act(model.scheduler.retire())
    assert saved(model) == [(90, 2), (1000, 0)], "of what is worth the same a byte the longest unused went"
    assert not any(slot.tokens for slot in model.scheduler.slots)


# Idle slots


def test_an_idle_slot_with_a_long_prefix_outlives_short_ones():
    model = fake(n_slots=2, n_batch=4096, n_ctx=4096)
    alone(model, 1500, 0)
    for start in range(1, 6):
        alone(model, 50, start)
    assert alone(model, 1500, 0, tail=(5,)).n_cached == 1500


def test_a_long_prefix_that_nobody_asks_for_goes_in_the_end():
    model = fake(n_slots=2, n_batch=4096, n_ctx=4096)
    alone(model, 1500, 0)
    for start in range(1, 50):
        alone(model, 50, start)
    assert all(len(slot.tokens) == 50 for slot in model.scheduler.slots)


def test_where_it_can_be_saved_a_long_prefix_has_no_claim_to_a_slot():
    model = fake(n_slots=2, n_batch=4096, n_ctx=4096, ram_bytes=10**5)
    alone(model, 1500, 0)
    alone(model, 100, 1)
    alone(model, 100, 2)
    assert sorted(slot.tokens[0] - VOCABULARY for slot in model.scheduler.slots) == [1, 2]
    assert saved(model) == [(1500, 0)]


def test_an_idle_slot_that_another_one_holds_too_goes_before_one_used_earlier():
    model = fake(n_slots=3, n_batch=4096, n_ctx=4096, costs=Costs(copy=2))
    alone(model, 60, 1)
    alone(model, 300, 0)
    part = alone(model, 100, 0, tail=(3,))  # copied: the long one's slot would lose too much
    assert part.n_cached == 100
    alone(model, 70, 2)
    held = sorted(len(slot.tokens) for slot in model.scheduler.slots)
    assert held == [60, 70, 300]


def test_in_a_unified_memory_what_is_held_elsewhere_gives_way_first():
    model = fake(n_slots=4, n_batch=4096, n_ctx=1000, n_cells=1000, ram_bytes=10**5, costs=Costs(restore=200))
    alone(model, 300, 1)
    alone(model, 300, 0)
    state = State(list(model.scheduler.slots[1].tokens), None, 300)
    model.scheduler.held.tree.hold(state, state.tokens, None)
    alone(model, 500, 2)
    held = sorted(
        (len(slot.tokens), slot.tokens[0] - VOCABULARY) for slot in model.scheduler.slots if slot.tokens
    )
    assert held == [(300, 1), (500, 2)]


def test_eviction_asks_nothing_of_states_while_there_is_room(monkeypatch):
    scheduler: Scheduler = one_slot(ram_bytes=10**6).scheduler
    model = FakeModel(scheduler, 4096)
    asked = []
    n_alone = scheduler.held.tree.n_alone
    monkeypatch.setattr(
        scheduler.held.tree, "n_alone", lambda holder: asked.append(holder) or n_alone(holder)
    )
    for start in range(5):
        alone(model, 100, start)
    assert not any(isinstance(holder, State) for holder in asked)


def test_under_a_window_an_idle_conversation_is_not_given_up_for_a_few_tokens():
    model = fake(n_slots=3, n_window=10, n_batch=4096, n_ctx=4096)
    alone(model, 500, 0)
    other = Sequence("other", (*prompt(500, start=0)[:1], *prompt(40, start=7)), max_tokens=1)
    run(model, other)
    assert alone(model, 500, 0, tail=(5,)).n_cached == 500


def test_what_the_disk_did_not_take_is_believed_in_no_more():
    model = one_slot(disk_bytes=10**5)
    alone(model, 200, 0)
    held = model.scheduler.held
    alone(model, 10, 1)
    (state,) = (each for each in held.stash.states if each.length == 200)
    assert model.scheduler.lost(state)
    assert state not in held.stash.states
    assert held.stash.used["disk"] == 0 == model.scheduler.held.tree.n_alone(state)
