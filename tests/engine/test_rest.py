"""What an engine does while nobody asks: it writes to disk what a crash would lose."""

import asyncio
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import wire, worker
from engine.client import Engine
from engine.loading import fingerprint
from engine.request import Done, EngineConfig, GenerationRequest, Sampling
from engine.worker import Channel, ClientGone, Inbox

PROMPT = GenerationRequest(tuple(range(100, 400)), Sampling(temperature=0), max_tokens=2, ignore_eos=True)


async def cached(engine: Engine) -> int:
    """Tokens of the prompt that were there already."""
    async for event in engine.submit(PROMPT):
        if isinstance(event, Done):
            return event.n_cached_tokens
    raise AssertionError("no Done")


def test_what_was_written_at_rest_is_there_after_a_kill(smollm2_gguf, tmp_path):
    config = EngineConfig(
        smollm2_gguf,
        n_ctx=512,
        n_parallel=2,
        n_threads=1,
        cache_disk_mb=100,
        cache_folder=tmp_path / "prefixes",
    )

    async def main():
        engine = await Engine.start(config)
        try:
            assert await cached(engine) == 0
            while not list((tmp_path / "prefixes").glob("*.state")):
                await asyncio.sleep(0.05)
            assert (await engine.stats()).cache_disk_bytes > 0
            os.kill(engine.pid or 0, signal.SIGKILL)
            while engine.alive:
                await asyncio.sleep(0.01)
            assert await cached(engine) == 299
        finally:
            await engine.close()

    asyncio.run(main())


class FakeLoop:
    """Has so many things to do at rest; `asks` says when somebody asks in between."""

    idle = True

    def __init__(self, n_things: int, asks=lambda _: None) -> None:
        self.left = n_things
        self.asks = asks

    def note(self, ids) -> None:
        assert not list(ids), "it works for nobody"

    def rest(self) -> bool:
        self.left -= 1
        self.asks(self.left)
        return self.left > 0


@pytest.fixture
def line(monkeypatch):
    monkeypatch.setattr(worker, "REST_S", 0.001)
    ours, theirs = socket.socketpair()
    yield Channel(ours), theirs
    ours.close()
    theirs.close()


def test_a_request_waits_for_one_thing_and_not_for_all(line):
    channel, theirs = line

    def ask(left: int) -> None:
        if left == 7:
            theirs.sendall(wire.frame(wire.AskStats(1)))

    loop = FakeLoop(10, ask)
    inbox = Inbox(channel, loop)  # pyright: ignore[reportArgumentType]
    assert inbox.next() == [wire.AskStats(1)]
    assert loop.left == 7


def test_nothing_is_done_for_who_asks_again_at_once(line):
    channel, theirs = line
    loop = FakeLoop(10)
    inbox = Inbox(channel, loop)  # pyright: ignore[reportArgumentType]
    submit = wire.Submit(1, PROMPT)
    for _ in range(3):
        theirs.sendall(wire.frame(submit))
        assert inbox.next() == [submit]
    assert loop.left == 10


def test_questions_that_come_all_the_time_do_not_keep_it_from_its_rest(line, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(worker, "REST_S", 10.0)
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    channel, theirs = line
    question = wire.frame(wire.AskStats(1))
    loop = FakeLoop(10, lambda _: theirs.sendall(question))
    inbox = Inbox(channel, loop)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        theirs.sendall(question)
        assert inbox.next() == [wire.AskStats(1)]
        assert loop.left == 10
        now_s[0] += 6
    assert inbox.next() == [wire.AskStats(1)], "asked while it was at rest"
    assert loop.left == 9


def test_when_all_is_done_it_waits_and_hears_that_the_client_went(line):
    channel, theirs = line
    loop = FakeLoop(2, lambda left: left or theirs.close())
    with pytest.raises(ClientGone):
        Inbox(channel, loop).next()  # pyright: ignore[reportArgumentType]
    assert loop.left == 0


# What a saved state belongs to.


def test_the_fingerprint_knows_every_file_that_decides_what_cells_hold(tmp_path):
    files: dict[str, Path] = {}
    for name in (
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
        "legal.gguf",
        "applied.gguf",
        "draft.gguf",
    ):
        files[name] = tmp_path / name
        files[name].write_bytes(b"old")
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"another model's")
    config = EngineConfig(
        files["m-00001-of-00002.gguf"], adapters=(("legal", files["legal.gguf"]),),
        lora=((files["applied.gguf"], 1.0),), draft_model=files["draft.gguf"],
    )  # fmt: skip
    for name, path in files.items():
        before = fingerprint(config)
        path.write_bytes(b"overwritten")
        assert (fingerprint(config) == before) == (name == "draft.gguf"), name


def test_names_that_change_places_make_another_fingerprint(tmp_path):
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    for path in (one, two):
        path.write_bytes(b"adapter")
        os.utime(path, (1, 1))
    forth = EngineConfig(one, adapters=(("a", one), ("b", two)))
    back = EngineConfig(one, adapters=(("a", two), ("b", one)))
    assert fingerprint(forth) != fingerprint(back)
