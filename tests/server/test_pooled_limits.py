"""Limits of keys on embeddings and reranking, whoever computes them; and on the wait for a model's load."""

import asyncio
import json
import threading

import numpy as np
import pytest

from engine.request import EngineRestarted, QueueFull, Tenant
from server.embedding import BATCH
from server.ticket import Ticket

KEYS = [("alice", "key-of-alice"), ("bob", "key-of-bob")]
ALICE = {"authorization": "Bearer key-of-alice"}
BOB = {"authorization": "Bearer key-of-bob"}
KINDS = {"embed": "embedding", "rank": "rerank"}
N = BATCH + 8  # texts of a request: two calls of the fake engine, two batches of the embedder
#: Each is 80 tokens in all, 2 a text.
EMBED = ("/v1/embeddings", {"model": "embed", "input": ["one two"] * N})
RERANK = ("/v1/rerank", {"model": "rank", "query": "one ", "documents": ["two"] * N})
BUILT_IN = ("/v1/embeddings", {"model": "all-minilm-l6-v2", "input": ["one two"] * N})
CHAT = ("/v1/chat/completions", {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]})
STREAM = ("/v1/chat/completions", CHAT[1] | {"stream": True})
ALL = pytest.mark.parametrize("ask", [EMBED, RERANK, BUILT_IN], ids=["embed", "rerank", "built-in"])
BY_ENGINE = pytest.mark.parametrize("ask", [EMBED, RERANK], ids=["embed", "rerank"])
TOKENS = 2 * N


@pytest.fixture
def limited(build):
    """A function: limits of alice -> a house where alice has them and bob has none."""

    def make(*, preload=True, engine_options=(), **limits):
        return build(
            keys=KEYS, key_limits={"alice": limits}, kinds=KINDS, preload=preload,
            engine_options=engine_options, clock=lambda: 1000.0,
        )  # fmt: skip

    return make


def post(house, ask, headers=ALICE):
    return house.call("POST", ask[0], json=ask[1], headers=headers)


def metric(house, line: str) -> float:
    lines = house.call("GET", "/metrics", headers=BOB).text.splitlines()
    return float(next((each.rpartition(" ")[2] for each in lines if each.startswith(line + " ")), 0))


def code(response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


class Gate:
    """Holds engine and embedder before the first text, or `after` it, until `open`."""

    def __init__(self, house, *, after: bool = False) -> None:
        self.house = house
        event = asyncio.Event()
        if after:
            house.engine.pause = event
        else:
            house.engine.stall = event
        self._event, self._thread, self._n_free = event, threading.Event(), int(after)
        self._documents = house.embedder.documents
        house.embedder.documents = self._wait

    def _wait(self, texts) -> np.ndarray:
        if self._n_free:
            self._n_free -= 1
        else:
            assert self._thread.wait(20)
        return self._documents(texts)

    def open(self) -> None:
        self._event.set()
        self._thread.set()
        self.house.engine.stall = self.house.engine.pause = None


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def n_asked(house) -> int:
    """Requests that an engine or the embedder has."""
    return len(house.engine.requests) + house.embedders.waiting


@BY_ENGINE
def test_the_engine_is_told_on_whose_behalf_it_reads(limited, ask):
    house = limited(weight=3, priority=-1, max_running=2)
    for headers in (ALICE, BOB):
        assert post(house, ask, headers).status_code == 200
    tenants = [request.tenant for request in house.engine.requests]
    assert tenants == [Tenant("alice", 3, -1, 2), Tenant("bob")]


def test_the_embedders_queue_knows_the_keys_too(limited):
    house = limited(weight=3)

    async def main():
        gate = Gate(house)
        async with house.client() as client:
            asking = [
                asyncio.create_task(client.post(BUILT_IN[0], json=BUILT_IN[1], headers=headers))
                for headers in (ALICE, BOB)
            ]
            await until(lambda: house.embedders.waiting == 2)
            tenants = {job.tenant for job in house.embedders._queue}
            gate.open()
            return tenants, [(await each).status_code for each in asking]

    assert asyncio.run(main()) == ({Tenant("alice", 3), Tenant("bob")}, [200, 200])


@ALL
def test_open_requests_past_the_limit_are_refused_and_no_neighbour_notices(limited, ask):
    house = limited(max_requests=1)

    async def main():
        gate = Gate(house)
        async with house.client() as client:

            async def once(headers):
                return await client.post(ask[0], json=ask[1], headers=headers)

            running = asyncio.create_task(once(ALICE))
            await until(lambda: n_asked(house) == 1)
            refused = await once(ALICE)
            neighbour = asyncio.create_task(once(BOB))
            await until(lambda: n_asked(house) == 2)
            gate.open()
            return code(refused), [(await each).status_code for each in (running, neighbour)]

    assert asyncio.run(main()) == ((429, "too_many_requests"), [200, 200])


@ALL
def test_tokens_are_charged_as_read_and_usage_is_exported_by_key_and_model(limited, ask):
    house = limited(tokens_per_minute=TOKENS + 10)
    first = post(house, ask)
    assert first.json()["usage"] == {"prompt_tokens": TOKENS, "total_tokens": TOKENS}
    assert first.headers["x-ratelimit-remaining-tokens"] == "10"
    refused = post(house, ask)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 0
    assert post(house, ask, BOB).status_code == 200
    for key in ("alice", "bob"):
        assert metric(house, f'lq_key_tokens_total{{key="{key}",kind="prompt"}}') == TOKENS
        assert metric(house, f'lq_key_tokens_total{{key="{key}",kind="completion"}}') == 0
    assert metric(house, 'lq_key_requests_total{key="alice"}') == 2
    assert metric(house, 'lq_key_refused_total{key="alice",reason="rate_limit_exceeded"}') == 1
    assert metric(house, 'lq_key_requests_open{key="alice"}') == 0
    model = ask[1]["model"]
    assert metric(house, f'lq_tokens_total{{kind="prompt",model="{model}"}}') == 2 * TOKENS


@BY_ENGINE
@pytest.mark.parametrize("error", [QueueFull(9, 3), EngineRestarted("gone")])
def test_what_fails_before_anything_is_read_costs_nothing(limited, ask, error):
    house = limited(tokens_per_minute=100)
    house.engine.fails = error
    assert post(house, ask).headers["x-ratelimit-remaining-tokens"] == "100"
    assert metric(house, 'lq_key_tokens_total{key="alice",kind="prompt"}') == 0


@ALL
def test_a_first_text_that_is_read_too_late_is_an_error_that_costs_nothing(limited, ask):
    house = limited(ttft_s=0.02, total_s=60, tokens_per_minute=1000)
    gate = Gate(house)
    response = post(house, ask)
    gate.open()
    assert code(response) == (503, "first_token_timeout")
    assert (response.headers["retry-after"], response.headers["x-should-retry"]) == ("5", "true")
    assert response.headers["x-ratelimit-remaining-tokens"] == "1000"
    assert house.engine.cancelled == len(house.engine.requests)
    assert metric(house, 'lq_key_refused_total{key="alice",reason="first_token_timeout"}') == 1
    assert metric(house, 'lq_key_requests_open{key="alice"}') == 0


@ALL
def test_once_something_is_read_only_the_total_time_counts(limited, ask):
    house = limited(ttft_s=0.5)

    async def main():
        gate = Gate(house, after=True)
        async with house.client() as client:
            asking = asyncio.create_task(client.post(ask[0], json=ask[1], headers=ALICE))
            await asyncio.sleep(0.6)
            gate.open()
            return (await asking).status_code

    assert asyncio.run(main()) == 200


@ALL
def test_a_request_that_takes_too_long_is_cut_off_and_costs_what_was_read(limited, ask):
    house = limited(total_s=0.3, tokens_per_minute=1000)
    gate = Gate(house, after=True)
    response = post(house, ask)
    gate.open()
    assert code(response) == (504, "request_timeout")
    assert response.headers["x-should-retry"] == "false"
    assert house.engine.cancelled == len(house.engine.requests)
    n_read = 2 * BATCH if ask is BUILT_IN else 2
    assert metric(house, 'lq_key_tokens_total{key="alice",kind="prompt"}') == n_read
    assert response.headers["x-ratelimit-remaining-tokens"] == str(1000 - n_read)


class Leaving:
    """A client on its own connection that sends a request and closes it when told to."""

    def __init__(self, house, ask, headers) -> None:
        self._house, self._ask = house, ask
        self._body = [json.dumps(ask[1]).encode()]
        self._gone = asyncio.Event()
        own = {"host": "localhost", "content-type": "application/json"} | headers
        self._headers = [(name.encode(), value.encode()) for name, value in own.items()]
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        path = self._ask[0]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": self._headers, "server": ("localhost", 80), "client": ("127.0.0.1", 0),
            "root_path": "",
        }  # fmt: skip
        await self._house.app(scope, self._receive, self._send)

    async def _receive(self):
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message) -> None:
        pass

    async def hang_up(self) -> None:
        self._gone.set()
        async with asyncio.timeout(20):
            await self.task


@ALL
def test_a_client_that_hangs_up_cancels_its_work_at_once_and_pays_what_was_read(limited, ask, monkeypatch):
    house = limited(tokens_per_minute=1000)
    reads, read = [], Ticket.read

    def counted(ticket, n_tokens):
        reads.append(n_tokens)
        read(ticket, n_tokens)

    monkeypatch.setattr(Ticket, "read", counted)

    async def main():
        gate = Gate(house, after=True)
        client = Leaving(house, ask, ALICE)
        await until(lambda: reads)
        await client.hang_up()
        account = house.service.accounts._accounts["alice"]
        open_now = account.n_open, house.embedders.waiting, len(house.embedders._queue)
        gate.open()
        return open_now

    assert asyncio.run(main()) == (0, 0, 0)
    assert house.engine.cancelled == len(house.engine.requests)
    assert reads == [2 * BATCH if ask is BUILT_IN else 2]
    assert metric(house, 'lq_key_tokens_total{key="alice",kind="prompt"}') == reads[0]


# While a model loads

LOADED = pytest.mark.parametrize(
    "ask", [EMBED, RERANK, CHAT, STREAM], ids=["embed", "rank", "chat", "stream"]
)


@LOADED
@pytest.mark.parametrize(("limits", "told"), [
    ({"ttft_s": 0.02, "total_s": 60}, (503, "first_token_timeout")),
    ({"total_s": 0.02}, (504, "request_timeout")),
])  # fmt: skip
def test_the_wait_for_a_load_counts(limited, ask, limits, told):
    house = limited(preload=False, tokens_per_minute=1000, **limits)
    standings = house.service.roster.standings

    async def main():
        house.loading = asyncio.Event()
        async with house.client() as client:
            late = await client.post(ask[0], json=ask[1], headers=ALICE)
            waiting = [standing.waiting for standing in standings().values()]
            house.loading.set()
            after = await client.post(ask[0], json=ask[1], headers=BOB)
            return late, waiting, after.status_code

    late, waiting, after = asyncio.run(main())
    assert code(late) == told
    assert late.headers["x-ratelimit-remaining-tokens"] == "1000"
    assert not any(waiting)
    assert after == 200
    assert len(house.engine.requests) == 1, "the late one never reached the engine"


@LOADED
def test_a_client_that_hangs_up_while_its_model_loads_waits_no_more(limited, ask):
    house = limited(preload=False)
    standings = house.service.roster.standings

    async def main():
        house.loading = asyncio.Event()
        client = Leaving(house, ask, ALICE)
        await until(lambda: sum(each.waiting for each in standings().values()) == 1)
        await client.hang_up()
        left = sum(each.waiting for each in standings().values())
        house.loading.set()
        await until(lambda: any(each.state == "ready" for each in standings().values()))
        return left, sum(each.users for each in standings().values())

    assert asyncio.run(main()) == (0, 0)
    assert house.engine.requests == []


@LOADED
def test_one_keys_flood_while_a_model_loads_leaves_others_their_share(limited, ask):
    house = limited(preload=False, engine_options={"n_parallel": 1, "max_queue": 2})
    standings = house.service.roster.standings

    async def main():
        house.loading = asyncio.Event()
        async with house.client() as client:

            def asking(headers):
                return asyncio.create_task(client.post(ask[0], json=ask[1], headers=headers))

            flood = [asking(ALICE) for _ in range(3)]
            await until(lambda: sum(each.waiting for each in standings().values()) == 3)
            refused = await asking(ALICE)
            guest = asking(BOB)
            await until(lambda: sum(each.waiting for each in standings().values()) == 4)
            house.loading.set()
            return refused, [(await each).status_code for each in (*flood, guest)]

    refused, answers = asyncio.run(main())
    assert code(refused) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    assert answers == [200] * 4
