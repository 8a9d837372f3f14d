"""A draft model that is asked first whether it pays: what it reads, when, and how much at a time."""

from typing import Any

import numpy as np
import pytest

from engine.drafter import FIRST_READ, N_BATCH, Drafter
from engine.guessing import Guessing
from engine.luck import GUESSES_A_SEQUENCE
from engine.pace import CAUTION, Pace
from engine.sequence import Sequence

TOKEN_S, CALL_S = 0.001, 0.002
ROOM = 16


class Clock:
    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


class FakeContext:
    """A draft model that takes its time and guesses the token behind the last one, or nonsense."""

    n_batch = N_BATCH
    n_ctx_seq = 4096

    def __init__(self, clock: Clock) -> None:
        self.clock, self.right = clock, True
        self.calls: list[int] = []  # tokens of each
        self.held: dict[int, list[int]] = {}
        self.batch = self
        self._last: dict[int, int] = {}
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def clear(self) -> None:  # of the batch, and of the memory: tests have no failed calls
        self._n = 0

    def extend(self, tokens, *, start: int, sequence: int, output: bool) -> int:  # noqa: ARG002
        held = self.held.setdefault(sequence, [])
        assert len(held) == start, "positions without a gap"
        held += tokens
        self._n += len(tokens)
        self._last[self._n - 1] = tokens[-1]
        return self._n - 1

    def add(self, token: int, position: int, sequence: int, *, output: bool) -> int:
        return self.extend([token], start=position, sequence=sequence, output=output)

    def remove(self, sequence: int, start: int = 0) -> None:
        del self.held.setdefault(sequence, [])[start:]

    def decode(self) -> None:
        self.calls.append(self._n)
        self.clock.now_s += CALL_S if self._n <= ROOM else TOKEN_S * self._n

    def logits(self, index: int) -> np.ndarray:
        logits = np.zeros(10_000)
        logits[self._last[index] + (1 if self.right else 2)] = 1
        return logits


class House:
    """Sequences that count up by one, and guesses for them; calls of the large model take `step_s`."""

    def __init__(self, monkeypatch, *, step_s: float = 0.040, stall_s: float | None = 0.25) -> None:
        self.clock = Clock()
        for name in ("drafter", "guessing"):
            monkeypatch.setattr(f"engine.{name}.time", self.clock)
        self.context = FakeContext(self.clock)
        drafter = Drafter(self.context)  # pyright: ignore[reportArgumentType]
        drafter.token_s, drafter.call_s = TOKEN_S, CALL_S
        self.drafter, self.step_s = drafter, step_s
        self.pace = Pace(max_stall_s=stall_s)
        for count in (1, 4, 8, 32):
            self.pace.learn(n_writing=count, n_prompt=0, seconds=self.call_s(count))
        self.guessing = Guessing(self.pace, most=ROOM, drafter=drafter)
        self.sequences: list[Sequence] = []
        self.total_s = 0.0

    def call_s(self, n_tokens: int) -> float:
        return self.step_s * (1 + n_tokens / 20)

    def add(self, n_prompt: int, max_tokens: int = 500) -> Sequence:
        slot = len(self.sequences)
        sequence = Sequence(slot, tuple(range(n_prompt)), max_tokens)
        sequence.slot = slot
        self.sequences.append(sequence)
        return sequence

    def step(self) -> dict[Sequence, list[int]]:
        """One call; what was guessed for it."""
        before_s = self.clock.now_s
        limits = {each: min(GUESSES_A_SEQUENCE, each.n_behind_next) for each in self.sequences}
        drafts = self.guessing.choose(limits)
        n_guesses, n_writing = sum(map(len, drafts.values())), len(self.sequences)
        for each in self.sequences:
            guesses = drafts.get(each, [])
            n_right = 0
            while n_right < len(guesses) and guesses[n_right] == each.tokens[-1] + 1 + n_right:
                n_right += 1
            each.tokens += range(each.tokens[-1] + 1, each.tokens[-1] + 2 + n_right)
            if guesses:
                self.guessing.learn(each, n_guesses=len(guesses), n_right=n_right)
        seconds = self.call_s(n_writing + n_guesses)
        self.guessing.called(n_writing, n_guesses=n_guesses, seconds=seconds)
        self.pace.learn(n_writing=n_writing, n_prompt=0, seconds=seconds, n_guesses=n_guesses)
        self.clock.now_s += seconds
        self.total_s += self.clock.now_s - before_s
        return drafts


@pytest.fixture
def make(monkeypatch) -> Any:
    return lambda **options: House(monkeypatch, **options)


def test_under_load_a_draft_model_computes_nothing(make):
    house = make()
    for _ in range(32):
        house.add(50)
    for _ in range(50):
        assert house.step() == {}
    assert house.context.calls == []


def test_a_draft_model_that_is_never_right_costs_next_to_nothing(make):
    for n_writing in (1, 4, 8):
        house = make()
        house.context.right = False
        for _ in range(n_writing):
            house.add(20)
        n_steps = 600
        for _ in range(n_steps):
            house.step()
        assert house.total_s <= 1.02 * n_steps * house.call_s(n_writing)
        assert 0 < len(house.context.calls) < n_steps / 5


def test_a_draft_model_that_was_never_right_is_tried_again_with_other_requests(make):
    house = make()
    house.context.right = False
    n_tries = []
    for _ in range(40):
        house.sequences.clear()
        house.add(40)
        n_tries.append(sum(bool(house.step()) for _ in range(50)))
    assert n_tries[0] > 0
    assert 0 < sum(n_tries[20:]) < 100
    house.context.right = True
    for _ in range(40):
        house.sequences.clear()
        house.add(40)
        n_tries.append(sum(bool(house.step()) for _ in range(20)))
    assert sum(n_tries[-5:]) > 80, "what comes true is found out"


def test_a_draft_model_that_is_right_is_used(make):
    house = make()
    sequence = house.add(40)
    for _ in range(50):
        house.step()
    assert sequence.n_written > 250
    assert house.guessing.n_right > 0.9 * house.guessing.n_tried > 0


def test_a_long_prompt_is_read_once_guesses_have_paid_for_it_and_no_stream_waits_longer_than_the_stall(make):
    house = make()
    house.add(40)
    first = [house.step() for _ in range(20)]
    long = house.add(2000)
    n_before, waits = len(house.context.calls), []
    for _ in range(300):
        before_s = house.clock.now_s
        house.step()
        waits.append(house.clock.now_s - before_s)
    assert any(first)
    assert len(house.context.held.get(1, [])) > 2000, "it was worth it"
    assert max(house.context.calls[n_before:]) < 0.25 / TOKEN_S
    assert max(waits) <= 0.25
    assert house.guessing.n_right > 100
    assert long.n_written > 300


def test_a_long_prompt_that_nothing_has_paid_for_is_left_alone(make):
    house = make()
    house.add(3000)
    for _ in range(200):
        assert house.step() == {}
    assert house.context.calls == []


def test_reading_is_cut_to_the_time_that_there_is(make):
    drafter = make().drafter
    sequence = Sequence(1, tuple(range(600)), 100)
    sequence.slot = 0
    assert drafter.n_missing(sequence) == 599
    assert drafter.read([sequence], within_s=0.1) == []
    assert drafter.n_missing(sequence) == 499
    assert drafter.read([sequence], within_s=-1) == []
    assert drafter.n_missing(sequence) == 499
    assert drafter.read([sequence], within_s=float("inf")) == []
    assert drafter.n_missing(sequence) == 499 - N_BATCH
    assert drafter.read([sequence], within_s=0.25) == [sequence]
    drafter.token_s = 0.0
    other = Sequence(2, tuple(range(1000, 1200)), 100)
    other.slot = 0
    assert drafter.read([other], within_s=1) == []
    assert drafter.n_missing(other) == 199 - FIRST_READ, "nobody knows yet how long that takes"


def test_warming_up_tells_what_calls_take(make):
    house = make()
    house.drafter.token_s = house.drafter.call_s = 0.0
    house.context.held = {}
    remove = house.context.clear
    house.context.clear = lambda: (house.context.held.clear(), remove())
    house.drafter.warm_up(1)
    assert house.drafter.token_s == pytest.approx(TOKEN_S)
    assert house.drafter.call_s == pytest.approx(CALL_S)
    assert house.context.held == {}


def test_the_call_that_is_planned_beside_reading_counts_against_the_stall(make):
    house = make(stall_s=0.2)
    house.add(40)
    for _ in range(20):
        house.step()
    house.add(500)
    n_before = len(house.context.calls)
    for _ in range(100):
        house.step()
    assert ROOM < max(house.context.calls[n_before:]) <= (CAUTION * 0.2 - house.call_s(2)) / TOKEN_S
