"""Who is in the next call where one tenant runs more than its share: it gives way, and nobody starves."""

import pytest

from engine.request import Tenant
from engine.sequence import Sequence
from tests.engine.fakes import FakeModel, fake, prompt, run

FLOOD, GUEST = Tenant("flood"), Tenant("guest")
PROMPT, BRIEF = 40, 6  # tokens that prompts may take: between two calls of who writes, and of a flood at once


def flooded(*, n_flood: int = 3, n_tokens: int = 5, n_slots: int = 4, **options) -> FakeModel:
    """A guest was here lately; now a flood has three of the four slots, and writes."""
    model = fake(n_slots=n_slots, n_batch=100, n_ctx=256, ram_bytes=10**6, **options)
    run(model, Sequence("earlier", prompt(3, start=900), max_tokens=1, tenant=GUEST))
    for number in range(n_flood):
        model.scheduler.add(
            Sequence(f"flood {number}", prompt(n_tokens, start=number), max_tokens=60, tenant=FLOOD)
        )
    return model


def step(model: FakeModel, *, n_prompt: int | None = PROMPT, n_brief: int | None = BRIEF, **options):
    """The next call, as the lengths of chunks by the tenants' initials."""
    model.step(n_prompt=n_prompt, n_brief=n_brief, **options)
    return sorted((chunk.sequence.tenant.name[0], len(chunk.tokens)) for chunk in model.calls[-1])


def settle(model: FakeModel) -> None:
    """Until all that runs is writing, and nobody misses anything."""
    step(model)
    while any(not each.is_writing or each.n_missed for each in model.scheduler.running):
        step(model)


def arrive(model: FakeModel, n_tokens: int, *, name: str = "guest", tenant: Tenant = GUEST) -> Sequence:
    sequence = Sequence(name, prompt(n_tokens, start=50 + n_tokens), max_tokens=9, tenant=tenant)
    model.scheduler.add(sequence)
    return sequence


def test_prompts_of_a_flood_are_computed_in_brief_calls():
    model = flooded(n_flood=3, n_tokens=10)
    calls = [step(model) for _ in range(8)]
    assert calls[0] == [("f", BRIEF)]
    assert all(sum(size for _, size in call) <= BRIEF + BRIEF // 5 for call in calls)


def test_one_tenant_alone_is_not_slowed_down():
    model = fake(n_slots=4, n_batch=100, n_ctx=256)
    for number in range(4):
        model.scheduler.add(Sequence(number, prompt(20, start=number), max_tokens=9, tenant=FLOOD))
    assert step(model) == [("f", 20)] * 4


def test_a_guests_prompt_goes_alone_and_at_once():
    model = flooded()
    settle(model)
    guest = arrive(model, 30)
    assert step(model) == [("g", 30)]
    assert guest.n_written == 1
    assert step(model) == [("f", 1), ("f", 1), ("f", 1), ("g", 1)]


def test_a_guests_prompt_goes_before_those_of_the_flood():
    model = flooded(n_tokens=30)
    step(model)
    arrive(model, 30)
    assert step(model) == [("g", 30)]


def test_writers_wait_for_no_more_of_prompts_than_they_may():
    model = flooded()
    settle(model)
    arrive(model, 90)
    calls = [step(model) for _ in range(5)]
    writers = [("f", 1)] * 3
    assert calls == [[("g", PROMPT)], writers, [("g", PROMPT)], writers, [("g", 10)]]


def test_what_several_calls_take_counts_together():
    model = flooded()
    settle(model)
    arrive(model, 30)
    assert step(model) == [("g", 30)]
    arrive(model, 25, name="second", tenant=Tenant("hasty"))
    assert step(model) == [("g", 1), ("h", PROMPT - 30)], "what is left, beside the guest who writes"


def test_a_flood_that_was_served_less_gets_its_turn_beside_a_long_prompt():
    model = flooded(n_flood=2)
    settle(model)
    late = arrive(model, 60, name="late", tenant=FLOOD)
    step(model)
    guest = arrive(model, 200)
    n_missed, before = 0, late.n_computed
    while not guest.n_written:
        call = step(model)
        n_missed = 0 if ("f", 1) in call else n_missed + sum(size for _, size in call)
        assert n_missed <= PROMPT + PROMPT // 5
    assert late.n_computed > before


def test_guests_of_lower_priority_do_not_go_first():
    model = flooded(n_tokens=30)
    step(model)
    urgent = Tenant("urgent", priority=1)
    for number in range(2):
        arrive(model, 31 + number, name=f"urgent {number}", tenant=urgent)
    assert {whose for whose, _ in step(model)} == {"u"}


def test_who_others_wait_for_does_not_give_way():
    model = flooded(n_flood=2)
    common = prompt(80, start=70)
    model.scheduler.add(Sequence("leader", (*common, 1), max_tokens=9, tenant=FLOOD))
    step(model)
    follower = Sequence("follower", (*common, 2), max_tokens=9, tenant=GUEST)
    model.scheduler.add(follower)
    n_calls = 0
    while not follower.n_written:
        step(model)
        n_calls += 1
    assert n_calls < 8, "in brief calls it were fourteen and as many between them"


def test_a_flood_guesses_nothing():
    model = flooded()
    settle(model)
    flood = model.scheduler.running
    guest = arrive(model, 5)
    assert all(model.scheduler.turns.is_over_share(each) for each in flood)
    step(model)
    assert not model.scheduler.turns.is_over_share(guest)


@pytest.mark.parametrize("n_prompt", [None, 1, 40])
@pytest.mark.parametrize("n_cells", [None, 260])
def test_whatever_the_limits_everybody_gets_all_that_was_asked_for(n_prompt, n_cells):
    model = flooded(n_flood=6, n_tokens=20, n_cells=n_cells)
    guests = []
    for number in range(6):
        step(model, n_prompt=n_prompt)
        guests.append(arrive(model, 10 + number, name=f"guest {number}"))
    run(model, n_prompt=n_prompt, n_brief=BRIEF)
    assert [each.n_written for each in guests] == [9] * 6
