"""Eight thousand random lives of a scheduler: arrivals, lengths, cancels, adapters, tenants, short memory.

Whatever happens, every request gets what it would get alone, nothing is shared that differs, the cells that
the scheduler counts are those there are, and nobody waits for ever, neither for a slot nor for a turn.
"""

import random

import pytest

from engine.fairness import Charged
from engine.holdings import Costs
from engine.request import Tenant
from engine.sequence import Sequence
from tests.engine.fakes import VOCABULARY, fake

N_TRACES = 10_000
N_GROUPS = 40  # of traces, each one test

TENANTS: list[Charged] = [
    Tenant(),
    Tenant("heavy", weight=3.0),
    Tenant("few", max_running=1),
    Tenant("urgent", priority=1),
]


class Trace:
    """One life: a model of some shape, and requests that come and go."""

    def __init__(self, seed: int) -> None:
        chance = self.chance = random.Random(seed)
        n_slots = chance.randint(1, 5)
        self.n_ctx = chance.choice([40, 100, 160])
        unified = chance.random() < 0.6
        shares = chance.random() < 0.85
        self.model = fake(
            n_slots=n_slots,
            n_batch=chance.choice([5, 8, 33, 100]),
            n_ctx=self.n_ctx,
            n_cells=chance.randint(self.n_ctx, 2 * self.n_ctx) if unified else None,
            share_prefixes=shares,
            n_window=chance.choice([0, 0, 0, 20]),
            costs=Costs(copy=chance.choice([0, 5]), restore=chance.choice([0, 16]), load=20),
            ram_bytes=chance.choice([0, 100, 300, 2000]),
            disk_bytes=chance.choice([0, 0, 300]),
        )
        self.tenants = chance.sample(TENANTS, chance.randint(1, len(TENANTS)))
        self.stems = [
            tuple(chance.randrange(3) for _ in range(chance.choice([1, 30, self.n_ctx // 2])))
            for _ in range(3)
        ]
        self.sequences: list[Sequence] = []
        self.cancelled: set[object] = set()
        self.drafts = chance.random() < 0.5

    def run(self) -> None:
        chance = self.chance
        for turn in range(30):
            if chance.random() < 0.4:
                self.arrive(turn)
            if chance.random() < 0.08:
                self.cancel()
            self.step()
        for _ in range(4000):
            if self.model.scheduler.idle:
                break
            self.step()
        self.check()

    def arrive(self, turn: int) -> None:
        chance = self.chance
        tail = tuple(chance.randrange(3) for _ in range(chance.randint(1, 15)))
        tokens = (chance.choice(self.stems) + tail)[: self.n_ctx - 1]
        group = chance.choice(["", "", "one", "other"])
        sequence = Sequence(
            turn,
            tokens,
            max_tokens=chance.randint(1, min(30, self.n_ctx - len(tokens))),
            tenant=chance.choice(self.tenants),
            namespace=(chance.choice(["", "", "salt"]), group),
            adapters=group,
        )
        self.sequences.append(sequence)
        self.model.scheduler.add(sequence)

    def cancel(self) -> None:
        live = [each for each in self.sequences if self.is_live(each)]
        if live:
            victim = self.chance.choice(live)
            self.cancelled.add(victim.id)
            self.model.act(self.model.scheduler.release(victim, forget=self.chance.random() < 0.3))

    def is_live(self, sequence: Sequence) -> bool:
        return sequence.id not in self.cancelled and sequence.n_written < sequence.max_tokens

    def step(self) -> None:
        drafts = {}
        if self.drafts:
            for each in self.model.scheduler.running:
                right = [(each.tokens[-1] + 1 + i) % VOCABULARY for i in range(self.chance.randint(0, 4))]
                wrong = self.chance.randint(0, 4)
                drafts[each] = [token + (i == wrong) for i, token in enumerate(right)]
        n_prompt = self.chance.choice([None, 1, 4, 20])
        n_brief = self.chance.choice([None, 2, 8])
        if self.model.scheduler.idle:
            self.model.act(self.model.scheduler.back_up())
        self.model.step(n_prompt=n_prompt, n_brief=n_brief, drafts=drafts)
        self.model.check_books()

    def check(self) -> None:
        assert self.model.scheduler.idle, "somebody waits for ever"
        for sequence in self.sequences:
            if sequence.id not in self.cancelled:
                first = sequence.prompt[-1] + 1
                expected = [(first + i) % VOCABULARY for i in range(sequence.max_tokens)]
                assert sequence.written == expected


@pytest.mark.parametrize("group", range(N_GROUPS))
def test_random_lives_end_well(group):
    for seed in range(group * N_TRACES // N_GROUPS, (group + 1) * N_TRACES // N_GROUPS):
        try:
            Trace(seed).run()
        except AssertionError as error:
            raise AssertionError(f"trace {seed}: {error}") from error
