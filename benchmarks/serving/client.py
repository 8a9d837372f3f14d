"""One streamed chat completion over loopback HTTP/1.1, and everything that is noted of it.

A protocol on asyncio's transports with uvicorn's own parser in C (httptools): the load generator shares the
cores with the servers, and a full client library costs several times as much for each chunk.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import httptools
import msgspec

#: refused: no connection; http: a status other than 200; error: an error within the stream; cut: the
#: connection ended before [DONE]; timeout: no end in time; short: fewer tokens than asked for although EOS
#: was to be ignored; skipped: not asked, since an earlier turn of the conversation had failed.
Failure = Literal["refused", "http", "error", "cut", "timeout", "short", "skipped"]


@dataclass(slots=True)
class Outcome:
    """What a client saw of one request. Times in seconds since the round began."""

    group: str
    client: int
    turn: int
    sent_s: float = 0.0
    stamps: list[float] = field(default_factory=list)  # of every chunk that held text
    sizes: list[int] = field(default_factory=list)  # characters of each of these chunks
    ended_s: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str | None = None
    text: str = ""
    left: bool = False  # the client hung up, as planned
    failure: Failure | None = None
    detail: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first text; None when none came."""
        return self.stamps[0] - self.sent_s if self.stamps else None

    @property
    def complete(self) -> bool:
        """Answered to the end."""
        return self.failure is None and not self.left


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Exchange(asyncio.Protocol):
    """One request and its response; `over` is set when nothing more will come."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.over = asyncio.Event()
        self.status: int | None = None
        self.finished = False
        self.body: bytearray = bytearray()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request at once."""
        self._transport = transport
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Bytes to the parser, which calls the on_ methods below."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever the reason: the exchange is over."""
        del exc
        self.over.set()

    def close(self) -> None:
        """Hang up, as a browser does whose tab is closed."""
        if self._transport:
            self._transport.close()
        self.over.set()

    def on_headers_complete(self) -> None:
        """The parser has the status line."""
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """A piece of the decoded body."""
        self.body += data

    def on_message_complete(self) -> None:
        """The response's regular end."""
        self.finished = True
        self.close()


class Stream(Exchange):
    """Notes each event of a server-sent stream in an Outcome."""

    def __init__(
        self, request: bytes, outcome: Outcome, *, origin: float, leave_after_chars: int | None
    ) -> None:
        super().__init__(request)
        self.outcome = outcome
        self.first = asyncio.Event()  # text has come
        self.done = False  # [DONE] has come
        self._origin = origin
        self._leave_after_chars = leave_after_chars
        self._rest = b""

    def on_body(self, data: bytes) -> None:
        """Split into events; what follows the last blank line waits for the next piece."""
        if self.status != 200:
            self.body += data
            return
        now = time.perf_counter() - self._origin
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if not self.over.is_set():
                self._event(event, now)

    def _event(self, event: bytes, now: float) -> None:
        name, _, value = event.partition(b": ")
        if name == b"data" and value == b"[DONE]":
            self.done = True
        elif name == b"data":
            try:
                self._chunk(_decode(value), now)
            except msgspec.DecodeError as error:
                self._fail(f"{error}: {value[:100]!r}")
        elif name == b"error":
            self._fail(value.decode("utf-8", "replace"))

    def _chunk(self, chunk: _Chunk, now: float) -> None:
        outcome = self.outcome
        if chunk.error is not None:
            self._fail(str(chunk.error))
        if chunk.usage:
            outcome.prompt_tokens = chunk.usage.prompt_tokens
            outcome.completion_tokens = chunk.usage.completion_tokens
            details = chunk.usage.prompt_tokens_details
            outcome.cached_tokens = details.cached_tokens if details else None
        for choice in chunk.choices:
            outcome.finish = choice.finish_reason or outcome.finish
            text = choice.delta.content or choice.delta.reasoning_content
            if text:
                outcome.stamps.append(now)
                outcome.sizes.append(len(text))
                outcome.text += text
                self.first.set()
        limit = self._leave_after_chars
        if limit is not None and len(outcome.text) >= limit:
            outcome.left = True
            self.close()

    def _fail(self, detail: str) -> None:
        self.outcome.failure, self.outcome.detail = "error", detail[:300]


def head(method: str, path: str, port: int, key: str | None) -> str:
    """The lines that every request begins with; `key`: of the API, None where none is needed."""
    lines = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    return f"{lines}Authorization: Bearer {key}\r\n" if key else lines


def post(port: int, path: str, body: Any, *, key: str | None = None) -> bytes:
    """The bytes of a request with a JSON body."""
    encoded = msgspec.json.encode(body)
    kind = f"Content-Type: application/json\r\nContent-Length: {len(encoded)}\r\n\r\n"
    return (head("POST", path, port, key) + kind).encode() + encoded


async def get(port: int, path: str, *, key: str | None = None, timeout_s: float = 30) -> bytes:
    """The body at a path of a loopback server; empty unless it answers 200 in time."""
    exchange = await exchanged(port, (head("GET", path, port, key) + "\r\n").encode(), timeout_s=timeout_s)
    return bytes(exchange.body) if exchange and exchange.status == 200 and exchange.finished else b""


async def exchanged(port: int, request: bytes, *, timeout_s: float) -> Exchange | None:
    """One request and its whole response; None when there was no connection, or no end in time."""
    try:
        async with asyncio.timeout(timeout_s):
            loop = asyncio.get_running_loop()
            _, exchange = await loop.create_connection(lambda: Exchange(request), "127.0.0.1", port)
            await exchange.over.wait()
    except (OSError, TimeoutError):
        return None
    return exchange


async def ask(
    port: int,
    body: dict[str, Any],
    outcome: Outcome,
    *,
    origin: float,
    timeout_s: float,
    key: str | None = None,
    leave_after_chars: int | None = None,
    on_first: asyncio.Event | None = None,
    until: asyncio.Event | None = None,
) -> None:
    """Send one request and fill its Outcome; never raises for what a server does.

    `on_first` is set with the first text; the client hangs up when `until` is set.
    """
    request = post(port, "/v1/chat/completions", body, key=key)
    outcome.sent_s = time.perf_counter() - origin
    stream = Stream(request, outcome, origin=origin, leave_after_chars=leave_after_chars)
    if on_first:
        stream.first = on_first
    try:
        async with asyncio.timeout(timeout_s):
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: stream, "127.0.0.1", port)
            await _over(stream, until)
    except TimeoutError:
        outcome.failure, outcome.detail = "timeout", f"no end within {timeout_s:.0f} s"
    except OSError as error:
        outcome.failure, outcome.detail = "refused", str(error)
    finally:
        stream.close()
    outcome.ended_s = time.perf_counter() - origin
    if not outcome.failure and not outcome.left:
        judge(stream, body)


async def _over(stream: Stream, until: asyncio.Event | None) -> None:
    """Wait for the end of the stream, or hang up when `until` is set before it."""
    if until is None:
        await stream.over.wait()
        return
    waits = [asyncio.ensure_future(event.wait()) for event in (stream.over, until)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        stream.outcome.left = not stream.over.is_set()
    finally:
        for wait in waits:
            wait.cancel()


def judge(stream: Stream, body: dict[str, Any]) -> None:
    """Call a response that ended by itself a failure where it is one."""
    outcome = stream.outcome
    if stream.status is None:
        outcome.failure, outcome.detail = "cut", "the connection ended before a response"
    elif stream.status != 200:
        text = stream.body.decode("utf-8", "replace")
        outcome.failure, outcome.detail = "http", f"{stream.status}: {text[:300]}"
    elif not stream.done:
        outcome.failure, outcome.detail = "cut", "the stream ended without [DONE]"
    elif body.get("ignore_eos") and (outcome.completion_tokens or 0) < body["max_tokens"]:
        outcome.failure = "short"
        outcome.detail = (
            f"{outcome.completion_tokens} of {body['max_tokens']} tokens, finish {outcome.finish}"
        )
