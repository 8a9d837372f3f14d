"""What the worker sends and when: text of fast steps together, everything else at once."""

import socket
from dataclasses import dataclass, field

import pytest

from engine import wire
from engine.request import Delta, Done, EngineError
from engine.stats import EngineStats
from engine.worker import Channel, Outbox

STATS = EngineStats(0, 0, 1, 1, 0, 0)


@dataclass
class FakeLoop:
    """Gives what it was told to, one list a step."""

    steps: list = field(default_factory=list)
    only_writes: bool = True

    def step(self):
        return self.steps.pop(0)

    def stats(self):
        return STATS


class Wire:
    """An outbox and what came out at the other end since the last look."""

    def __init__(self, hold_s: float) -> None:
        self.loop = FakeLoop()
        ours, self._theirs = socket.socketpair()
        self._sockets = ours, self._theirs
        self.outbox = Outbox(Channel(ours), self.loop, hold_s=hold_s)  # pyright: ignore[reportArgumentType]

    def step(self, *outputs) -> list:
        self.loop.steps.append(list(outputs))
        self.outbox.step()
        return self.received()

    def received(self) -> list:
        buffer = bytearray()
        while True:
            try:
                buffer += self._theirs.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return [(list(message.items), message.stats) for message in wire.messages(buffer)]

    def close(self) -> None:
        for one in self._sockets:
            one.close()


@pytest.fixture
def make_wire():
    made: list[Wire] = []

    def make(hold_s: float) -> Wire:
        made.append(Wire(hold_s))
        return made[-1]

    yield make
    for one in made:
        one.close()


def text(id: int, words: str, *tokens: int) -> tuple[int, Delta]:
    return id, Delta(words, tokens)


def test_held_text_goes_out_as_one_message_with_the_end(make_wire):
    wire = make_wire(hold_s=3600.0)
    wire.loop.only_writes = False
    assert wire.step(text(1, "a", 1)) == [([(1, Delta("a", (1,)))], None)], "the first at once"
    wire.loop.only_writes = True
    assert wire.step(text(1, "b", 2), text(2, "x", 7)) == []
    assert wire.step(text(1, "c", 3)) == []
    done = Done("stop", 1, 3)
    ((items, stats),) = wire.step((1, done))
    assert items == [(1, Delta("bc", (2, 3))), (2, Delta("x", (7,))), (1, done)]
    assert stats == STATS


def test_text_is_never_held_over_a_step_that_computes_a_prompt(make_wire):
    wire = make_wire(hold_s=3600.0)
    wire.loop.only_writes = False
    wire.step(text(1, "a", 1))
    wire.loop.only_writes = True
    assert wire.step(text(1, "b", 2)) == []
    wire.loop.only_writes = False
    before, after = wire.step(text(1, "c", 3))
    assert before == ([(1, Delta("b", (2,)))], None)
    assert after == ([(1, Delta("c", (3,)))], None)


def test_slow_steps_send_every_token(make_wire):
    wire = make_wire(hold_s=0.0)
    for token in range(3):
        assert wire.step(text(1, "a", token)) == [([(1, Delta("a", (token,)))], None)]


def test_a_failure_goes_out_at_once_as_an_error(make_wire):
    wire = make_wire(hold_s=3600.0)
    wire.step(text(1, "a", 1))
    ((items, _),) = wire.step((2, EngineError("broken")))
    assert str(items[-1][1].error()) == "broken"


def test_log_probabilities_of_joined_text_stay_in_order():
    first, second = Delta("a", (1,), ("p",)), Delta("", (2,), ("q",))  # pyright: ignore[reportArgumentType]
    assert Delta("a", (1,), (), 7).joined(second).n_prompt_tokens == 7
    assert first.joined(second) == Delta("a", (1, 2), ("p", "q"))  # pyright: ignore[reportArgumentType]
