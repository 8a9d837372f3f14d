"""Adapters take turns: streams wait for no more than the limit of all prompts together; all prompts end."""

import random

import pytest

from engine.rotation import MIN_PORTION
from engine.sequence import Sequence
from tests.engine.fakes import FakeModel, fake, prompt

LIMIT = 60


def stream(model: FakeModel, name: str, *, adapters: str) -> Sequence:
    """A sequence that writes."""
    tokens = prompt(3, start=len(model.scheduler.running))
    sequence = Sequence(name, tokens, max_tokens=4000, adapters=adapters)
    model.scheduler.add(sequence)
    while not sequence.is_writing:
        model.step(n_prompt=LIMIT)
    return sequence


def ask(model: FakeModel, adapters: str, length: int = 600) -> Sequence:
    number = len(model.scheduler.running) + len(model.scheduler.queue)
    start = 1000 + number
    sequence = Sequence(f"{adapters} {number}", prompt(length, start=start), max_tokens=1, adapters=adapters)
    model.scheduler.add(sequence)
    return sequence


def n_prompts(model: FakeModel) -> int:
    return sum(len(chunk.tokens) for chunk in model.calls[-1] if not chunk.is_writing)


def waits(model: FakeModel, writers: list[Sequence], n_calls: int, *, limit: int = LIMIT) -> int:
    """The most tokens of prompts between two tokens of any of them, those of its own calls included."""
    most, since = 0, dict.fromkeys(writers, 0)
    for _ in range(n_calls):
        model.step(n_prompt=limit)
        called = {chunk.sequence for chunk in model.calls[-1]}
        for each in writers:
            since[each] += n_prompts(model)
            most = max(most, since[each])
            since[each] = 0 if each in called else since[each]
    return most


def test_prompts_of_four_other_sets_count_together():
    model = fake(n_slots=5, n_batch=512, n_ctx=4096)
    writer = stream(model, "writer", adapters="")
    asked = [ask(model, adapters) for adapters in "abcd"]
    assert waits(model, [writer], 40) <= LIMIT
    computed = [each.n_computed for each in asked]
    assert min(computed) > 0.8 * max(computed), "they share it evenly"
    assert sum(computed) > 0.9 * LIMIT * 40 / 5, "and leave little of it"


def test_all_write_and_read():
    """No set is so late in the turn that nothing is left for it."""
    model = fake(n_slots=8, n_batch=512, n_ctx=4096)
    writers = [stream(model, f"writer {adapters}", adapters=adapters) for adapters in "abcd"]
    asked = [ask(model, adapters) for adapters in "abcd"]
    assert waits(model, writers, 60) <= LIMIT
    computed = [each.n_computed for each in asked]
    assert min(computed) > 0.8 * max(computed) > 0


@pytest.mark.parametrize("limit", [1, MIN_PORTION, 20])
def test_where_the_limit_is_too_small_to_divide_prompts_take_turns(limit):
    model = fake(n_slots=10, n_batch=512, n_ctx=4096)
    writers = [stream(model, f"writer {adapters}", adapters=adapters) for adapters in "abc"]
    asked = [ask(model, adapters, 300) for adapters in "abcdef"]
    n_calls = 30 * 6 * 6
    assert waits(model, writers, n_calls if limit == 1 else 200, limit=limit) <= limit
    computed = [each.n_computed for each in asked]
    assert min(computed) > 0.7 * max(computed) > 0


def test_one_set_alone_may_use_all_of_the_limit():
    model = fake(n_slots=3, n_batch=512, n_ctx=4096)
    stream(model, "writer", adapters="a")
    ask(model, "a")
    model.step(n_prompt=LIMIT)
    assert n_prompts(model) == LIMIT


def test_while_nobody_writes_calls_are_full():
    model = fake(n_slots=3, n_batch=512, n_ctx=4096)
    for adapters in "abc":
        ask(model, adapters)
    model.step(n_prompt=LIMIT)
    assert n_prompts(model) == 512


def test_who_is_owed_a_turn_and_goes_away_holds_nobody_up():
    model = fake(n_slots=4, n_batch=512, n_ctx=4096)
    writers = [stream(model, f"writer {adapters}", adapters=adapters) for adapters in "ab"]
    first, second = ask(model, "c"), ask(model, "d")
    for _ in range(20):
        model.step(n_prompt=MIN_PORTION)
        owed = model.scheduler.rotation._owed
        gone = next((each for each in (first, second) if each.adapters in owed), None)
        if gone is not None:
            break
    else:
        pytest.fail("nobody waited")
    model.act(model.scheduler.release(gone))
    left = second if gone is first else first
    before = left.n_computed
    assert waits(model, writers, 20, limit=MIN_PORTION) <= MIN_PORTION
    assert left.n_computed > before


@pytest.mark.parametrize("group", range(4))
def test_random_sets_of_streams_and_prompts(group):
    for seed in range(group * 25, group * 25 + 25):
        chance = random.Random(seed)
        names = [chr(ord("a") + i) for i in range(chance.randint(2, 6))]
        limit = chance.choice([1, 4, MIN_PORTION, 20, 60, 250])
        model = fake(n_slots=12, n_batch=256, n_ctx=8192)
        writers = [
            stream(model, f"{seed} {i}", adapters=chance.choice(names)) for i in range(chance.randint(1, 5))
        ]
        asked = [ask(model, chance.choice(names), chance.randint(1, 40)) for _ in range(chance.randint(1, 7))]
        for _ in range(len(asked)):
            waited = waits(model, writers, 400, limit=limit)
            several = len({each.adapters for each in model.scheduler.running}) > 1
            assert waited <= limit + (0 if several else max(MIN_PORTION, limit // 5)), seed
        assert all(each.n_written == 1 for each in asked), f"{seed}: a prompt never ends"
