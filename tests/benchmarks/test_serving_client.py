"""The load generator's client, fed with bytes: no server, no socket, no clock that matters."""

import asyncio
import json
import time

import pytest

from benchmarks.serving import load as load_module
from benchmarks.serving.client import Outcome, Stream, judge, post
from benchmarks.serving.load import Target, run_round
from benchmarks.serving.plan import Client, Turn

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = {"max_tokens": 3, "ignore_eos": True}


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed = True


def event(**fields) -> bytes:
    return b"data: " + json.dumps({"choices": []} | fields).encode() + b"\n\n"


def text(content: str, **fields) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": content}} | fields])


def usage(n_tokens: int) -> bytes:
    counts = {"prompt_tokens": 9, "completion_tokens": n_tokens, "total_tokens": 9 + n_tokens}
    return event(usage=counts | {"prompt_tokens_details": {"cached_tokens": 4}})


def chunked(body: bytes, size: int) -> bytes:
    """A body in chunks of a few bytes, wherever events begin and end."""
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def fed(*received: bytes, leave_after_chars: int | None = None) -> Stream:
    """A stream that has received this, and then the connection's end."""
    outcome = Outcome("clients", 0, 0)
    stream = Stream(b"request", outcome, origin=time.perf_counter(), leave_after_chars=leave_after_chars)
    wire = Wire()
    stream.connection_made(wire)
    assert wire.written == b"request"
    for data in received:
        stream.data_received(data)
    stream.connection_lost(None)
    if not outcome.failure and not outcome.left:
        judge(stream, BODY)
    return stream


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_events_are_read_however_the_bytes_are_cut(size):
    body = (
        text("", finish_reason=None) + text("a ") + text("b") + text("c", finish_reason="length") + usage(3)
    )
    outcome = fed(HEAD + chunked(body + b"data: [DONE]\n\n", size)).outcome
    assert outcome.failure is None
    assert outcome.text == "a bc"
    assert len(outcome.stamps) == 3  # the empty first chunk with the role is no text
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.completion_tokens) == (9, 4, 3)
    assert outcome.finish == "length"


@pytest.mark.parametrize(
    ("received", "failure", "told"),
    [
        (b"", "cut", "before a response"),
        (b"no http at all\r\n\r\n", "cut", "before a response"),
        (b"HTTP/1.1 429 Busy\r\nContent-Length: 4\r\n\r\nfull", "http", "429: full"),
        (HEAD + b"5\r\ndata:", "cut", "without [DONE]"),
        (HEAD + chunked(text("a"), 99), "cut", "without [DONE]"),
        (HEAD + chunked(event(error={"message": "no cells"}), 99), "error", "no cells"),
        (HEAD + chunked(b'error: {"message": "no cells"}\n\n', 99), "error", "no cells"),
        (HEAD + chunked(text("a") + usage(1) + b"data: [DONE]\n\n", 99), "short", "1 of 3 tokens"),
        (HEAD + chunked(b"data: {not json\n\n", 99), "error", "not json"),
    ],
)
def test_failures_are_told_apart(received, failure, told):
    outcome = fed(received).outcome
    assert outcome.failure == failure
    assert told in outcome.detail
    assert not outcome.complete


def test_a_client_that_leaves_hangs_up_and_hears_no_more():
    stream = fed(HEAD + chunked(text("abc") + text("def") + text("ghi"), 4096), leave_after_chars=5)
    assert stream.outcome.left
    assert stream.outcome.text == "abcdef"
    assert stream.outcome.failure is None


def played(monkeypatch, clients, answer) -> list[Outcome]:
    """A round in which `answer` stands for the server."""
    monkeypatch.setattr(load_module, "ask", answer)
    target = Target(port=1, model="m", running_metric="running", timeout_s=1)
    return asyncio.run(run_round(target, clients)).outcomes


def turn(content: str) -> Turn:
    return Turn(({"role": "user", "content": content},), 4)


def test_answers_go_into_the_history(monkeypatch):
    asked = []

    async def answer(_port, body, outcome, **_):
        asked.append([message["content"] for message in body["messages"]])
        outcome.text = f"answer {len(asked)}"

    played(monkeypatch, [Client(0.0, (turn("one"), turn("two")), history=True)], answer)
    assert asked == [["one"], ["one", "answer 1", "two"]]


def test_a_conversation_ends_with_its_first_failure_and_the_rest_is_counted(monkeypatch):
    async def answer(_port, _body, outcome, **_):
        outcome.failure = "http"

    outcomes = played(monkeypatch, [Client(0.0, (turn("one"), turn("two")), history=True)], answer)
    assert [outcome.failure for outcome in outcomes] == ["http", "skipped"]


def test_who_waits_for_a_group_waits_for_each_of_it_even_when_one_fails(monkeypatch):
    begun = []

    async def answer(_port, body, outcome, *, on_first, **_):
        begun.append(body["messages"][0]["content"])
        if begun[-1] == "fails":
            outcome.failure = "refused"
        else:
            on_first.set()

    streams = [Client(0.0, (turn("runs"),), group="streams"), Client(0.01, (turn("fails"),), group="streams")]
    played(monkeypatch, [Client(0.0, (turn("late"),), after="streams"), *streams], answer)
    assert begun == ["runs", "fails", "late"]


def test_too_many_clients_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="65 clients"):
        played(monkeypatch, [Client(0.0, (turn("x"),))] * 65, None)


def test_a_client_asks_no_more_when_those_that_it_waits_for_are_through(monkeypatch):
    asked = []

    async def answer(_port, body, _outcome, *, until, **_):
        asked.append(body["messages"][0]["content"])
        await (until.wait() if until else asyncio.sleep(0.01))

    flood = Client(0.0, (turn("flood"), turn("never")), group="flood", until="single")
    outcomes = played(monkeypatch, [flood, Client(0.0, (turn("single"),), group="single")], answer)
    assert sorted(asked) == ["flood", "single"]
    assert len(outcomes) == 2


def test_each_group_asks_with_its_key_and_others_with_any(monkeypatch):
    used = {}

    async def answer(_port, body, _outcome, *, key, **_):
        used[body["messages"][0]["content"]] = key

    monkeypatch.setattr(load_module, "ask", answer)
    target = Target(1, "m", "running", 1, keys={"heavy": "key-h", "light": "key-l"})
    clients = [Client(0.0, (turn(group),), group=group) for group in ("light", "heavy", "warm")]
    asyncio.run(run_round(target, clients))
    assert used == {"heavy": "key-h", "light": "key-l", "warm": "key-h"}
    assert Target(1, "m", "running", 1).key("heavy") is None


def test_a_key_goes_into_the_head_of_a_request_and_none_leaves_no_trace():
    assert b"\r\nAuthorization: Bearer abc\r\n" in post(1, "/v1", {}, key="abc")
    assert b"Authorization" not in post(1, "/v1", {})


def test_the_characters_of_every_chunk_are_noted():
    outcome = fed(HEAD + chunked(text("a ") + text("") + text("bcd"), 4096)).outcome
    assert outcome.sizes == [2, 3]
