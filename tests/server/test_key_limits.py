"""Limits of keys at work: who is refused, cut off and counted, and what the engine is told."""

import asyncio
import json
import logging

import pytest

from engine.request import EngineRestarted, QueueFull, Tenant
from server.key_settings import Limits

KEYS = [("alice", "key-of-alice"), ("bob", "key-of-bob")]
ALICE = {"authorization": "Bearer key-of-alice"}
BOB = {"authorization": "Bearer key-of-bob"}
PROMPT = 21  # tokens of the chat below, as the fake engine counts
ANSWER = 3
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
STREAM = CHAT | {"stream": True}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limited(build, clock):
    """A function: limits of alice -> a house where alice has them and bob has none."""
    return lambda **limits: build(keys=KEYS, key_limits={"alice": limits}, clock=clock)


def chat(house, headers, **fields):
    return house.call("POST", "/v1/chat/completions", json=CHAT | fields, headers=headers)


def metric(house, line: str, headers=ALICE) -> float:
    """The value of a figure; 0 for one that was never counted."""
    lines = house.call("GET", "/metrics", headers=headers).text.splitlines()
    return float(next((each.rpartition(" ")[2] for each in lines if each.startswith(line + " ")), 0))


def remaining(response) -> int:
    return int(response.headers["x-ratelimit-remaining-tokens"])


def test_the_engine_is_told_on_whose_behalf_it_runs(build):
    house = build(
        keys=KEYS,
        key_limits={"alice": {"weight": 3, "priority": -1, "isolated_cache": True}},
        limits=Limits(max_running=2),
    )
    chat(house, ALICE, n=2)
    chat(house, BOB)
    house.call("POST", "/v1/completions", json={"model": "fake", "prompt": "x"}, headers=ALICE)
    alice, bob = Tenant("alice", 3, -1, 2), Tenant("bob", 1, 0, 2)
    requests = house.engine.requests
    assert [each.tenant for each in requests] == [alice, alice, bob, alice]
    assert [each.cache_salt for each in requests] == ["key:alice\n", "key:alice\n", "", "key:alice\n"]


def test_where_no_key_is_needed_everybody_is_one_tenant_without_a_name(house):
    house.chat()
    assert house.engine.requests[0].tenant == Tenant()
    assert house.engine.requests[0].cache_salt == ""


def test_a_request_may_bring_a_salt_of_its_own_within_its_keys_cache(limited):
    house = limited(isolated_cache=True)
    for headers in (ALICE, BOB):
        chat(house, headers, cache_salt="key:alice\n")
        body = {"model": "fake", "prompt": ["x", "y"], "cache_salt": "key:alice\n"}
        house.call("POST", "/v1/completions", json=body, headers=headers)
    salts = [each.cache_salt for each in house.engine.requests]
    assert salts == ["key:alice\nkey:alice\n"] * 3 + ["any\nkey:alice\n"] * 3


@pytest.mark.parametrize("salt", ["", "x" * 257, 1, ["x"]])
@pytest.mark.parametrize(("path", "rest"), [("chat/completions", CHAT), ("completions", {"prompt": "x"})])
def test_a_salt_that_is_none_is_refused_by_name(house, path, rest, salt):
    body = {"model": "fake"} | rest | {"cache_salt": salt}
    response = house.call("POST", f"/v1/{path}", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "cache_salt")
    assert house.engine.requests == []


@pytest.mark.parametrize("body", [CHAT, STREAM])
def test_open_requests_past_the_limit_are_refused_and_no_neighbour_notices(limited, body):
    house = limited(max_requests=2)

    async def crowd():
        house.engine.pause = asyncio.Event()
        async with house.client() as client:

            async def ask(headers=ALICE):
                return await client.post("/v1/chat/completions", json=body, headers=headers)

            running = [asyncio.create_task(ask()) for _ in range(2)]
            while len(house.engine.requests) < 2:
                await asyncio.sleep(0)
            refused = await ask()
            neighbour = asyncio.create_task(ask(BOB))
            while len(house.engine.requests) < 3:
                await asyncio.sleep(0)
            figures = (await client.get("/metrics", headers=BOB)).text
            house.engine.pause.set()
            answers = [(await each).status_code for each in (*running, neighbour)]
            return refused, figures, answers, (await ask()).status_code

    refused, figures, answers, after = asyncio.run(crowd())
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "too_many_requests"
    assert "'alice' may have 2 requests" in refused.json()["error"]["message"]
    assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("1", "true")
    assert 'lq_key_requests_open{key="alice"} 2.0' in figures
    assert (answers, after) == ([200, 200, 200], 200)
    assert metric(house, 'lq_key_requests_open{key="alice"}') == 0


def test_tokens_are_charged_as_used_and_told_as_openai_tells_them(limited, clock):
    house = limited(tokens_per_minute=60)
    first = chat(house, ALICE, max_tokens=30)
    assert first.status_code == 200
    assert remaining(first) == 60 - PROMPT - ANSWER
    assert first.headers["x-ratelimit-limit-tokens"] == "60"
    assert first.headers["x-ratelimit-reset-tokens"] == "24s"
    second = chat(house, ALICE)
    assert remaining(second) == 60 - 2 * (PROMPT + ANSWER)
    third = chat(house, ALICE)  # needs 21, 12 are there
    assert third.status_code == 429
    assert third.json()["error"]["type"] == "rate_limit_error"
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert "60 tokens a minute" in third.json()["error"]["message"]
    assert (third.headers["retry-after"], third.headers["x-should-retry"]) == ("9", "true")
    assert remaining(third) == 12
    assert len(house.engine.requests) == 2
    clock.now += 8.9
    assert chat(house, ALICE).status_code == 429
    clock.now += 0.1
    assert chat(house, ALICE).status_code == 200
    free = chat(house, BOB)
    assert free.status_code == 200
    assert "x-ratelimit-limit-tokens" not in free.headers


def test_what_is_reserved_counts_until_the_answer_ends(limited):
    house = limited(tokens_per_minute=600)

    async def two():
        house.engine.pause = asyncio.Event()
        async with house.client() as client:
            body = STREAM | {"max_tokens": 500}
            async with client.stream("POST", "/v1/chat/completions", json=body, headers=ALICE) as running:
                refused = await client.post(
                    "/v1/chat/completions", json=CHAT | {"max_tokens": 100}, headers=ALICE
                )
                house.engine.pause.set()
                await running.aread()
            after = await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 100}, headers=ALICE)
            return running, refused, after

    running, refused, after = asyncio.run(two())
    assert remaining(running) == 600 - PROMPT - 500
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")  # 121 wanted, 79 there: 4.2 s
    assert after.status_code == 200
    assert remaining(after) == 600 - 2 * (PROMPT + ANSWER)


def test_an_answer_without_a_limit_of_its_own_is_charged_while_it_is_written(limited):
    house = limited(tokens_per_minute=50)
    house.engine.says = ["a"] * 40

    async def two():
        house.engine.pause = asyncio.Event()
        async with house.client() as client:
            async with client.stream("POST", "/v1/chat/completions", json=STREAM, headers=ALICE) as running:
                assert remaining(running) == 50 - PROMPT - 1
                house.engine.pause.set()
                await running.aread()
            return await client.post("/v1/chat/completions", json=CHAT, headers=ALICE)

    refused = asyncio.run(two())
    assert refused.status_code == 429
    assert remaining(refused) == 0
    assert refused.headers["retry-after"] == "15"  # 50 - 61 used = -11: twelve tokens until one is there


def test_a_long_max_tokens_counts_as_far_as_the_context_reaches(limited):
    house = limited(tokens_per_minute=100_000)

    async def opened():
        house.engine.pause = asyncio.Event()
        async with house.client() as client:
            body = STREAM | {"max_tokens": 2**31 - 1, "n": 2}
            async with client.stream("POST", "/v1/chat/completions", json=body, headers=ALICE) as running:
                return running

    n_ctx = house.engine.info.n_ctx
    assert remaining(asyncio.run(opened())) == 100_000 - PROMPT - 2 * (n_ctx - PROMPT)


def test_a_prompt_counts_once_for_all_its_choices_and_each_prompt_counts(limited):
    house = limited(tokens_per_minute=1000)
    assert remaining(chat(house, ALICE, n=3)) == 1000 - PROMPT - 3 * ANSWER
    body = {"model": "fake", "prompt": ["12345", "123"], "n": 2, "max_tokens": 5}
    response = house.call("POST", "/v1/completions", json=body, headers=ALICE)
    assert remaining(response) == 1000 - PROMPT - 3 * ANSWER - 8 - 4 * ANSWER


def test_a_text_prompt_larger_than_the_bucket_is_refused_for_good_with_both_numbers(limited):
    house = limited(tokens_per_minute=50)
    for fields in ({"prompt": "x" * 50}, {"prompt": list(range(50))}):
        response = house.call("POST", "/v1/completions", json={"model": "fake"} | fields, headers=ALICE)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (429, "request_over_rate_limit")
        assert "50 tokens" in error["message"]
        assert "lq.toml" in error["message"]
        assert response.headers["x-should-retry"] == "false"
        assert "retry-after" not in response.headers
        assert remaining(response) == 50
    assert house.engine.requests == []


def test_without_tokens_a_request_is_refused_before_any_work(limited, monkeypatch):
    house = limited(tokens_per_minute=PROMPT + ANSWER)
    assert remaining(chat(house, ALICE)) == 0
    monkeypatch.setattr(house.engine, "tokenize", None)  # would raise
    assert chat(house, ALICE).status_code == 429
    assert chat(house, ALICE, collection="nope").status_code == 429  # nor is anything searched


@pytest.mark.parametrize("body", [CHAT, STREAM])
@pytest.mark.parametrize("error", [QueueFull(9, 3), EngineRestarted("gone")])
def test_what_fails_before_its_first_token_costs_nothing(limited, body, error):
    house = limited(tokens_per_minute=100)
    house.engine.fails = error
    response = house.call("POST", "/v1/chat/completions", json=body, headers=ALICE)
    assert response.status_code in {429, 503}
    assert remaining(response) == 100
    code = response.json()["error"]["code"]
    assert metric(house, f'lq_key_refused_total{{key="alice",reason="{code}"}}') == 1
    assert metric(house, 'lq_key_tokens_total{key="alice",kind="prompt"}') == 0


@pytest.mark.parametrize("body", [CHAT, STREAM])
def test_a_first_token_that_comes_too_late_is_an_error_before_anything_is_sent(limited, body):
    house = limited(ttft_s=0.02, total_s=60, tokens_per_minute=100)
    house.engine.stall = asyncio.Event()
    response = house.call("POST", "/v1/chat/completions", json=body, headers=ALICE)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "first_token_timeout"
    assert "0.02 s" in response.json()["error"]["message"]
    assert (response.headers["retry-after"], response.headers["x-should-retry"]) == ("5", "true")
    assert remaining(response) == 100
    assert house.engine.cancelled == 1
    assert metric(house, 'lq_key_refused_total{key="alice",reason="first_token_timeout"}') == 1
    assert metric(house, 'lq_key_requests_open{key="alice"}') == 0


def test_the_wait_for_the_first_token_begins_before_the_prompt_is_made(limited, monkeypatch):
    house = limited(ttft_s=0.02)

    async def never(*_, **__):
        await asyncio.Event().wait()

    monkeypatch.setattr(house.engine, "tokenize", never)
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]  # tokenised apart, before the request
    assert chat(house, ALICE, messages=messages).json()["error"]["code"] == "first_token_timeout"
    assert house.engine.requests == []


def test_after_the_first_token_only_the_total_time_counts(limited):
    house = limited(ttft_s=0.02)

    async def slow():
        house.engine.pause = asyncio.Event()
        async with house.client() as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=ALICE))
            while not house.engine.requests:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            house.engine.pause.set()
            return await asking

    assert asyncio.run(slow()).status_code == 200


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_that_takes_too_long_is_cut_off(limited, n):
    house = limited(total_s=0.05)
    house.engine.pause = asyncio.Event()
    response = chat(house, ALICE, n=n)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert "0.05 s" in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"
    assert house.engine.cancelled == n
    assert metric(house, 'lq_key_refused_total{key="alice",reason="request_timeout"}') == 1
    assert metric(house, 'lq_key_tokens_total{key="alice",kind="completion"}') == n  # what was written


def test_a_stream_that_takes_too_long_ends_with_an_error_frame(limited):
    house = limited(total_s=0.05)
    house.engine.pause = asyncio.Event()
    response = chat(house, ALICE, stream=True)
    frames = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert response.status_code == 200
    assert frames[1]["choices"][0]["delta"]["content"] == "Hel"
    assert frames[-1]["error"]["code"] == "request_timeout"
    assert "[DONE]" not in response.text
    assert house.engine.cancelled == 1
    assert metric(house, 'lq_key_refused_total{key="alice",reason="request_timeout"}') == 1


def test_a_client_that_reads_nothing_is_cut_off_after_the_total_time(limited, monkeypatch):
    monkeypatch.setattr("server.ticket.READING_S", 0.01)
    house = limited(total_s=0.05)
    sent, body = [], [json.dumps(STREAM).encode()]

    async def stuck(message):
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive():
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        return await asyncio.Event().wait()

    headers = {"host": "localhost", "content-type": "application/json"} | ALICE
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "server": ("localhost", 80), "client": ("127.0.0.1", 0), "root_path": "",
    }  # fmt: skip
    asyncio.run(house.app(scope, receive, stuck))
    assert sent == ["http.response.start", "http.response.body"]
    assert house.engine.cancelled == 1
    assert metric(house, 'lq_key_requests_open{key="alice"}') == 0


def test_the_general_limits_hold_without_a_key(build):
    house = build(limits=Limits(total_s=0.05, max_requests=1))
    house.engine.pause = asyncio.Event()
    assert house.chat().json()["error"]["code"] == "request_timeout"
    house.engine.pause = None
    assert house.chat().status_code == 200


def test_an_error_of_another_kind_of_timeout_is_not_taken_for_a_limit(limited):
    house = limited(ttft_s=60, total_s=60)
    house.engine.fails = TimeoutError("of something else")
    assert chat(house, ALICE).json()["error"]["code"] == "internal_error"


def test_a_client_that_leaves_is_charged_for_what_it_got(limited):
    house = limited(tokens_per_minute=1000)

    async def leave():
        house.engine.pause = asyncio.Event()
        async with house.client() as client:
            async with client.stream(
                "POST", "/v1/chat/completions", json=STREAM | {"max_tokens": 500}, headers=ALICE
            ) as got:
                async for line in got.aiter_lines():
                    if '"content":"Hel"' in line:
                        break
            house.engine.stall, house.engine.pause = asyncio.Event(), None
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=ALICE))
            while len(house.engine.requests) < 2:
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    assert house.engine.cancelled == 2
    assert metric(house, 'lq_key_tokens_total{key="alice",kind="prompt"}') == 2 * PROMPT
    assert metric(house, 'lq_key_tokens_total{key="alice",kind="completion"}') == 1
    assert metric(house, 'lq_key_requests_open{key="alice"}') == 0
    house.engine.stall = None
    assert remaining(chat(house, ALICE)) == 1000 - 2 * PROMPT - 1 - PROMPT - ANSWER


def test_embeddings_are_limited_and_charged_too(limited, clock):
    house = limited(tokens_per_minute=12)

    def embed(text, headers=ALICE):
        body = {"model": "all-minilm-l6-v2", "input": text}
        return house.call("POST", "/v1/embeddings", json=body, headers=headers)

    too_long = embed("w " * 21)  # for the embedder: costs nothing
    assert (too_long.status_code, remaining(too_long)) == (400, 12)
    assert remaining(embed(["one two", "three"])) == 12 - 3
    refused = embed("a " * 20)  # about ten tokens
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    assert remaining(refused) == 9
    assert embed("a " * 20, BOB).status_code == 200
    clock.now += 5
    assert remaining(embed("a " * 20)) == 0  # twenty it was
    assert embed("a").status_code == 429
    assert metric(house, 'lq_key_tokens_total{key="alice",kind="prompt"}') == 23


def test_an_embedding_whose_guess_is_larger_than_the_bucket_still_runs(limited):
    house = limited(tokens_per_minute=2)
    body = {"model": "all-minilm-l6-v2", "input": "a-very-long-word-of-one-token"}
    assert house.call("POST", "/v1/embeddings", json=body, headers=ALICE).status_code == 200


def test_usage_is_exported_by_the_name_of_the_key_and_never_by_the_key(build, caplog):
    house = build(keys=[*KEYS, ("api_key_file:3", "key-of-file")], key_limits={"alice": {}})
    with caplog.at_level(logging.INFO, logger="lq.server"):
        chat(house, ALICE)
        chat(house, ALICE, temperature=9)
        chat(house, {"authorization": "Bearer wrong-key-given"})
        chat(house, {"authorization": "Bearer key-of-file"})
    text = house.call("GET", "/metrics", headers=BOB).text
    for line in (
        'lq_key_requests_total{key="alice"} 1.0',
        'lq_key_requests_total{key="bob"} 0.0',
        'lq_key_requests_total{key="api_key_file:3"} 1.0',
        f'lq_key_tokens_total{{key="alice",kind="prompt"}} {PROMPT}.0',
        'lq_key_tokens_total{key="alice",kind="cached"} 3.0',
        f'lq_key_tokens_total{{key="alice",kind="completion"}} {ANSWER}.0',
        'lq_key_requests_open{key="alice"} 0.0',
        'lq_key_refused_total{key="-",reason="invalid_api_key"} 1.0',
    ):
        assert line in text
    lines = [record.getMessage().split()[1:] for record in caplog.records]
    assert [(line[1], line[2], line[-1]) for line in lines] == [
        ("/v1/chat/completions", "200", "key=alice"),
        ("/v1/chat/completions", "400", "key=alice"),
        ("/v1/chat/completions", "401", "key=-"),
        ("/v1/chat/completions", "200", "key=api_key_file:3"),
    ]
    for secret in ("key-of", "wrong-key", house.service.settings.keys["alice"].key_sha256[:6]):
        assert secret not in text + caplog.text
