"""What the scheduler decided, done in native memory; what cannot be brought is told, and leaves nothing."""

import numpy as np
import pytest

from engine.hands import Hands
from engine.llama import Context
from engine.sequence import Begin, Drop, Save, Sequence
from engine.stash import Demote, Discard, State
from engine.states import States

TOKENS = list(range(100, 120))


@pytest.fixture(params=[False, True], ids=["streams", "unified"])
def hands(request, model, tmp_path):
    options = {"n_ctx": 256, "n_batch": 64, "n_seq_max": 4, "n_threads": 1}
    with Context.open(model, **options, unified=request.param) as context:
        context.batch.clear()
        context.batch.extend(TOKENS, start=0, sequence=0, output=False)
        context.decode()
        yield Hands(context, States(tmp_path / "states", fingerprint="f"))


def sequence(slot: int) -> Sequence:
    made = Sequence("a", tuple(TOKENS), max_tokens=1)
    made.slot = slot
    return made


def lengths(hands: Hands) -> list[int]:
    return [hands.context.length(slot) for slot in range(4)]


def test_a_busy_slot_lends_its_prefix_to_several(hands):
    begins = [Begin(sequence(slot), slot, 0, length) for slot, length in ((1, 20), (2, 12), (3, 1))]
    assert hands.act(begins) == []
    assert lengths(hands) == [20, 20, 12, 1]


def test_a_slot_is_cut_dropped_and_begun_anew(hands):
    assert hands.act([Begin(sequence(0), 0, 0, 7)]) == []
    assert lengths(hands) == [7, 0, 0, 0]
    assert hands.act([Begin(sequence(0), 0, None, 0)]) == []
    assert lengths(hands) == [0, 0, 0, 0]
    hands.act([Drop(0), Drop(3)])
    assert lengths(hands) == [0, 0, 0, 0]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_saved_state_comes_back_after_its_slot_was_overwritten(hands, on_disk):
    state = State(TOKENS, "", 1)
    hands.act([Save(0, state), Drop(0), *([Demote(state)] if on_disk else [])])
    assert hands.act([Begin(sequence(2), 2, state, 15), Discard(state)]) == []
    assert lengths(hands) == [0, 0, 15, 0]
    assert hands.states.read(state) is None


def test_what_is_copied_is_what_was_there_when_it_was_asked_for(hands):
    """A slot that lends its cells may be overwritten by the very next step."""
    state = State(TOKENS[:5], "", 1)
    hands.act([Begin(sequence(1), 1, 0, 5), Save(1, state)])
    steps = [Begin(sequence(2), 2, 0, 18), Begin(sequence(0), 0, state, 5), Begin(sequence(3), 3, 0, 5)]
    assert hands.act(steps) == []
    assert lengths(hands) == [5, 5, 18, 5]


def test_what_cannot_be_brought_is_told_and_leaves_the_slot_empty(hands):
    gone, broken, short = (State(TOKENS, "", 1) for _ in range(3))
    hands.act([Save(0, gone), Save(0, broken), Discard(gone)])
    hands.states.keep(broken, np.zeros(100, np.uint8))
    hands.act([Begin(sequence(1), 1, 0, 4), Save(1, short)])
    wanted = [sequence(slot) for slot in (1, 2, 3)]
    sources = zip(wanted, (gone, broken, short), strict=True)
    begins = [Begin(each, each.slot, source, 20) for each, source in sources]
    assert hands.act(begins) == begins
    assert lengths(hands) == [20, 0, 0, 0]
