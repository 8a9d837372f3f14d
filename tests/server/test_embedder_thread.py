"""The built-in embedder's thread: whose turn it is, what is refused, what goes away."""

import asyncio
import threading
from contextlib import aclosing

import numpy as np
import pytest

from engine.request import EngineUnavailable, Pooled, Read, Tenant
from server.embedding import BATCH, EmbedderThread, TooLong
from server.errors import EmbedderBusy

FLOOD, GUEST = Tenant("flood"), Tenant("guest")


class Slow:
    """An embedder whose batches wait while `gate` is clear; `seen`: the first word of each."""

    dimension, max_tokens, name, fingerprint = 1, 20, "slow", "f"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.seen: list[str] = []

    def documents(self, texts):
        self.begun.set()
        assert self.gate.wait(20)
        self.seen.append(texts[0].split()[0])
        return np.ones((len(texts), 1), np.float32)

    queries = documents

    def count_tokens(self, text):
        return len(text.split())


@pytest.fixture
def slow():
    embedder = Slow()
    yield embedder
    embedder.gate.set()


def run(slow: Slow, scenario, *, max_queue: int = 64) -> None:
    async def main():
        thread = EmbedderThread(lambda _: slow, max_queue=max_queue)
        try:
            await scenario(thread)
        finally:
            slow.gate.set()
            await thread.close()

    asyncio.run(asyncio.wait_for(main(), 20))


async def events(thread: EmbedderThread, texts: list[str], tenant: Tenant = FLOOD) -> list:
    async with aclosing(thread.embed("x", texts, as_queries=False, tenant=tenant)) as found:
        return [event async for event in found]


async def asked(*jobs) -> list[asyncio.Task]:
    """The jobs, each in the queue, in this order."""
    tasks = [asyncio.create_task(job) for job in jobs]
    await asyncio.sleep(0)
    return tasks


async def until_begun(slow: Slow) -> None:
    await asyncio.to_thread(slow.begun.wait, 20)


def test_what_is_read_is_told_batch_by_batch(slow):
    async def scenario(thread):
        slow.gate.set()
        *before, last = await events(thread, ["one two"] * (2 * BATCH + 1))
        assert before == [Read(2 * BATCH), Read(2 * BATCH)]
        assert isinstance(last, Pooled)
        assert (last.values.shape, last.n_tokens) == ((2 * BATCH + 1, 1), 4 * BATCH + 2)

    run(slow, scenario)


def test_a_flood_of_one_key_leaves_others_their_share_of_the_queue(slow):
    async def scenario(thread):
        flood = await asked(*(events(thread, [f"flood{number}"]) for number in range(5)))
        with pytest.raises(EmbedderBusy):
            await events(thread, ["more"])
        guests = await asked(*(events(thread, ["guest"], GUEST) for _ in range(2)))
        with pytest.raises(EmbedderBusy):
            await events(thread, ["more"], GUEST)
        assert thread.waiting == 7
        slow.gate.set()
        await asyncio.gather(*flood, *guests)
        assert thread.waiting == 0
        assert slow.seen[:5].count("guest") == 2, "its turns come as often as the flood's"

    run(slow, scenario, max_queue=4)


def test_a_short_job_of_the_same_key_does_not_wait_for_a_long_one(slow):
    async def scenario(thread):
        tasks = await asked(events(thread, ["long"] * 10 * BATCH), events(thread, ["short"]))
        slow.gate.set()
        await asyncio.gather(*tasks)
        assert slow.seen.index("short") <= 2
        assert len(slow.seen) == 11

    run(slow, scenario)


def test_weight_and_priority_decide_whose_batch_is_next(slow):
    async def scenario(thread):
        light, heavy = Tenant("light"), Tenant("heavy", weight=3)
        tasks = await asked(
            events(thread, ["light"] * 12 * BATCH, light),
            events(thread, ["heavy"] * 12 * BATCH, heavy),
            events(thread, ["urgent"] * 3 * BATCH, Tenant("urgent", weight=0.01, priority=1)),
        )
        slow.gate.set()
        await asyncio.gather(*tasks)
        first, *rest = slow.seen
        assert first == "light", "it came when nobody else was there"
        assert rest[:3] == ["urgent"] * 3
        assert rest[3:15].count("heavy") == 9

    run(slow, scenario)


def test_a_batch_that_fails_ends_its_job_and_no_other(slow):
    async def scenario(thread):
        slow.gate.set()
        bad = ["ok"] * BATCH + ["w " * 21] + ["ok"] * 5 * BATCH
        found = await asyncio.gather(
            events(thread, bad), events(thread, ["good"], GUEST), return_exceptions=True
        )
        assert isinstance(found[0], TooLong)
        assert f"input[{BATCH}]" in str(found[0])
        assert isinstance(found[1], list)
        assert len(await events(thread, ["again"])) == 1
        assert slow.seen.count("ok") == 1, "nothing of it ran after its failure"
        assert (thread.waiting, len(thread._queue)) == (0, 0)

    run(slow, scenario)


def test_who_goes_away_leaves_its_place_and_the_thread_goes_on_with_others(slow):
    async def scenario(thread):
        running, queued, other = await asked(
            events(thread, ["running"] * 3 * BATCH), events(thread, ["queued"]), events(thread, ["other"])
        )
        await until_begun(slow)
        for task in (running, queued):
            task.cancel()
        await asyncio.gather(running, queued, return_exceptions=True)
        assert (thread.waiting, len(thread._queue)) == (1, 1)
        slow.gate.set()
        await other
        assert slow.seen == ["running", "other"]

    run(slow, scenario)


def test_closing_fails_those_that_wait_and_whoever_comes_later(slow):
    async def scenario(thread):
        running, queued = await asked(events(thread, ["a"] * 2 * BATCH), events(thread, ["b"], GUEST))
        await until_begun(slow)
        await thread.close()
        slow.gate.set()
        found = await asyncio.gather(running, queued, return_exceptions=True)
        assert [type(each) for each in found] == [EngineUnavailable] * 2
        with pytest.raises(EngineUnavailable, match="the server stops"):
            await events(thread, ["c"])
        assert slow.seen == ["a"]

    run(slow, scenario)
