"""Which saved states stay within the budgets."""

from engine.stash import Copy, Demote, Discard, Stash, State


def state(size: int, *, pinned: bool = False) -> State:
    return State(list(range(size)), "", size, pinned=pinned)


def stash(ram: int, disk: int = 0, worth: dict[State, int] | None = None) -> Stash:
    return Stash(ram_bytes=ram, disk_bytes=disk, n_alone=lambda each: (worth or {}).get(each, each.length))


def test_the_longest_unused_of_equals_goes_first():
    kept = stash(100)
    one, two, three = state(40), state(40), state(40)
    assert kept.add(one) == kept.add(two) == []
    assert kept.add(three) == [Discard(one)]
    kept.touch(two)
    assert kept.add(four := state(40)) == [Discard(three)]
    assert kept.states == {two, four}
    assert kept.used == {"ram": 80, "disk": 0}


def test_what_others_hold_too_goes_before_what_must_be_computed_again():
    cheap, dear = state(40), state(40)
    kept = stash(100, worth={cheap: 1})
    kept.add(dear)
    kept.add(cheap)
    assert kept.add(state(40)) == [Discard(cheap)]


def test_memory_gives_way_to_disk_and_disk_to_nothing():
    kept = stash(50, 50)
    one, two, three = state(40), state(40), state(40)
    kept.add(one)
    assert kept.add(two) == [Demote(one)]
    assert one.tier == "disk"
    assert kept.add(three) == [Demote(two), Discard(one)]
    assert kept.used == {"ram": 40, "disk": 40}


def test_a_pinned_state_stays_and_leaves_less_to_others():
    kept = stash(100)
    pinned = state(80, pinned=True)
    kept.add(pinned)
    assert kept.fits(20)
    assert not kept.fits(21)
    assert kept.add(other := state(40)) == [Discard(other)]
    pinned.pinned = False
    assert kept.fits(100)


def test_what_memory_cannot_hold_goes_to_disk_at_once_and_pushes_nobody_out():
    kept = stash(50, 200)
    small, large = state(40), state(60)
    kept.add(small)
    assert kept.fits(60)
    assert not kept.fits(60, pinned=True), "who made way goes on from memory"
    assert not kept.fits(201)
    assert kept.add(large) == [Demote(large)]
    assert kept.used == {"ram": 40, "disk": 60}
    without = stash(0, 100)
    assert without.fits(60)
    assert without.add(only := state(60)) == [Demote(only)]


def test_what_is_larger_than_all_is_not_kept():
    kept = stash(10, 10)
    assert kept.add(one := state(11)) == [Discard(one)]
    assert kept.used == {"ram": 0, "disk": 0}


def test_the_end_moves_memory_to_disk():
    kept = stash(100, 50)
    one, two = state(40), state(40, pinned=True)
    kept.add(one)
    kept.add(two)
    gone = kept.empty("ram")
    assert {type(each) for each in gone} == {Demote, Discard}
    assert kept.used == {"ram": 0, "disk": 40}


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
