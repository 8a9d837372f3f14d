"""Which saved states stay within the budgets."""

from engine.stash import Copy, Demote, Discard, Stash, State


def state(size: int, *, pinned: bool = False) -> State:
    return State(list(range(size)), "", size, pinned=pinned)


def stash(ram: int, disk: int = 0, cost: dict[State, int] | None = None) -> Stash:
    costs = {} if cost is None else cost
    return Stash(
        ram_bytes=ram,
        disk_bytes=disk,
        cost=lambda each, _: costs.get(each, each.length),
        forget=lambda each: costs.pop(each, None),
    )


def test_the_longest_unused_of_equals_goes_first():
    kept = stash(200)
    one, two, three = state(80), state(80), state(80)
    assert kept.add(one) == kept.add(two) == []
    assert kept.add(three) == [Discard(one)]
    kept.touch(two)
    assert kept.add(four := state(80)) == [Discard(three)]
    assert kept.states == {two, four}
    assert kept.used == {"ram": 160, "disk": 0}


def test_what_others_hold_too_goes_before_what_must_be_computed_again():
    cheap, dear = state(80), state(80)
    kept = stash(200, cost={cheap: 1})
    kept.add(dear)
    kept.add(cheap)
    assert kept.add(state(80)) == [Discard(cheap)]


def test_memory_gives_way_to_disk_and_disk_to_nothing():
    kept = stash(100, 100)
    one, two, three = state(80), state(80), state(80)
    kept.add(one)
    assert kept.add(two) == [Demote(one)]
    assert one.tier == "disk"
    assert kept.add(three) == [Demote(two), Discard(one)]
    assert kept.used == {"ram": 80, "disk": 80}


def test_a_pinned_state_stays_and_leaves_less_to_others():
    kept = stash(200)
    pinned = state(160, pinned=True)
    kept.add(pinned)
    assert kept.fits(40)
    assert not kept.fits(42)
    assert kept.add(other := state(80)) == [Discard(other)]
    pinned.pinned = False
    assert kept.fits(200)


def test_what_memory_cannot_hold_goes_to_disk_at_once_and_pushes_nobody_out():
    kept = stash(100, 400)
    small, large = state(80), state(120)
    kept.add(small)
    assert kept.fits(120)
    assert not kept.fits(120, pinned=True), "who made way goes on from memory"
    assert not kept.fits(402)
    assert kept.add(large) == [Demote(large)]
    assert kept.used == {"ram": 80, "disk": 120}
    without = stash(0, 200)
    assert without.fits(120)
    assert without.add(only := state(120)) == [Demote(only)]


def test_what_is_larger_than_all_is_not_kept():
    kept = stash(20, 20)
    assert kept.add(one := state(22)) == [Discard(one)]
    assert kept.used == {"ram": 0, "disk": 0}


def test_costs_are_asked_for_when_somebody_must_go():
    shared, other = state(80), state(80)
    costs = {shared: 1}
    kept = stash(200, cost=costs)
    kept.add(shared)
    kept.add(other)
    costs[shared] = 80  # who held the same is gone
    costs[other] = 1
    assert kept.add(state(80)) == [Discard(other)]
    assert other not in costs, "told before the next is asked for"


def test_what_others_hold_too_takes_no_room_on_disk():
    redundant, kept_too = state(80), state(80)
    kept = stash(100, 1000, cost={redundant: 0})
    kept.add(redundant)
    assert kept.add(kept_too) == [Discard(redundant)]
    assert kept.add(state(80)) == [Demote(kept_too)]


def test_the_end_moves_memory_to_disk():
    kept = stash(200, 100)
    one, two = state(80), state(80, pinned=True)
    kept.add(one)
    kept.add(two)
    gone = kept.empty("ram")
    assert {type(each) for each in gone} == {Demote, Discard}
    assert kept.used == {"ram": 0, "disk": 80}


def test_copies_are_counted_on_disk_and_moved_there_without_being_counted_twice():
    kept = stash(100, 100)
    one, two = state(40), state(40)
    kept.add(one)
    kept.add(two)
    assert {kept.copy()[0].state, kept.copy()[0].state} == {one, two}
    assert kept.copy() == []
    assert kept.used == {"ram": 80, "disk": 80}
    kept.touch(two)
    assert kept.add(state(50)) == [Demote(one)]
    assert (one.tier, one.copied) == ("disk", False)
    assert kept.used == {"ram": 90, "disk": 80}
    kept.remove(two)
    assert kept.used == {"ram": 50, "disk": 40}


def test_a_copy_pushes_out_what_only_disk_has_and_no_other_copy():
    kept = stash(100, 50)
    old = State(list(range(40)), "", 40, tier="disk")
    assert kept.add(old) == []
    one, two = state(40), state(40)
    kept.add(one)
    kept.add(two)
    (gone, copied) = kept.copy()
    assert gone == Discard(old)
    assert isinstance(copied, Copy)
    assert kept.copy() == [], "the other one does not fit beside it"
    assert kept.used == {"ram": 80, "disk": 40}


def test_what_is_pinned_is_not_copied():
    kept = stash(100, 100)
    kept.add(state(40, pinned=True))
    assert kept.copy() == []
