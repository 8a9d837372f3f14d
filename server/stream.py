"""Server-sent events, frame by frame as OpenAI streams, and the response that sends them.

A failure in the middle is a frame with `error` and no [DONE]: OpenAI's clients raise it.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send
from msgspec import UNSET

from engine.request import Delta, Done, Event
from server import answer
from server.answer import Envelope
from server.errors import Failure
from server.schema import chat, completion
from server.schema.usage import Usage
from server.work import Work

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Events = AsyncIterator[tuple[int, Event]]
Frame = Callable[[int, Event], bytes]


def frame(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class ChatFrames:
    """Chunks of a chat answer: the role first, then text, then the reason of the end with the sources."""

    def __init__(self, envelope: Envelope, work: Work, *, include_usage: bool) -> None:
        self._envelope = envelope
        self._work = work
        self._usage = None if include_usage else UNSET

    def opening(self) -> bytes:
        first = [
            self._chunk(n, chat.ChunkDelta(role="assistant", content=""))
            for n, _ in enumerate(self._work.requests)
        ]
        return b"".join(first)

    def event(self, index: int, event: Event) -> bytes:
        if isinstance(event, Done):
            delta = chat.ChunkDelta()
            if self._work.sources is not None:
                delta.sources = self._work.sources
            return self._chunk(index, delta, finish_reason=answer.finish(event))
        if not event.text and not event.logprobs:
            return b""
        logprobs = answer.chat_logprobs(event.logprobs) if event.logprobs else None
        return self._chunk(index, chat.ChunkDelta(content=event.text), logprobs=logprobs)

    def closing(self, usage: Usage) -> bytes:
        return b"" if self._usage is UNSET else self._encoded([], usage)

    def _chunk(self, index: int, delta: chat.ChunkDelta, **fields: Any) -> bytes:
        return self._encoded([chat.ChunkChoice(index=index, delta=delta, **fields)], self._usage)

    def _encoded(self, choices: list[chat.ChunkChoice], usage: Any) -> bytes:
        of = self._envelope
        return frame(
            chat.ChatChunk(
                id=of.id, created=of.created, model=of.model, system_fingerprint=of.fingerprint,
                choices=choices, usage=usage,
            )
        )  # fmt: skip


class TextFrames:
    """Chunks of a plain completion; the echoed prompt comes first."""

    def __init__(self, envelope: Envelope, work: Work, *, include_usage: bool) -> None:
        self._envelope = envelope
        self._prefixes = work.prefixes
        self._offsets = [len(prefix) for prefix in work.prefixes]
        self._usage = None if include_usage else UNSET

    def opening(self) -> bytes:
        return b"".join(self._chunk(n, prefix) for n, prefix in enumerate(self._prefixes) if prefix)

    def event(self, index: int, event: Event) -> bytes:
        if isinstance(event, Done):
            return self._chunk(index, "", finish_reason=answer.finish(event))
        if not event.text and not event.logprobs:
            return b""
        logprobs = self._logprobs(index, event)
        return self._chunk(index, event.text, logprobs=logprobs)

    def closing(self, usage: Usage) -> bytes:
        return b"" if self._usage is UNSET else self._encoded([], usage)

    def _logprobs(self, index: int, delta: Delta) -> completion.TextLogprobs | None:
        if not delta.logprobs:
            return None
        logprobs = answer.text_logprobs(delta.logprobs, offset=self._offsets[index])
        self._offsets[index] += sum(map(len, logprobs.tokens))
        return logprobs

    def _chunk(self, index: int, text: str, **fields: Any) -> bytes:
        return self._encoded([completion.TextChoice(index=index, text=text, **fields)], self._usage)

    def _encoded(self, choices: list[completion.TextChoice], usage: Any) -> bytes:
        of = self._envelope
        return frame(
            completion.Completion(
                id=of.id, created=of.created, model=of.model, system_fingerprint=of.fingerprint,
                choices=choices, usage=usage,
            )
        )  # fmt: skip


async def body(
    first: tuple[int, Event],
    events: Events,
    frames: ChatFrames | TextFrames,
    *,
    n_choices: int,
    failed: Callable[[BaseException], Failure],
) -> AsyncGenerator[bytes, None]:
    """Every frame of an answer whose first event has come already; `failed` says what to tell of an error."""
    done: dict[int, Done] = {}
    yield frames.opening()
    try:
        index, event = first
        while True:
            if isinstance(event, Done):
                done[index] = event
            if piece := frames.event(index, event):
                yield piece
            try:
                index, event = await anext(events)
            except StopAsyncIteration:
                break
    except Exception as error:  # the status is sent: tell it in the stream, where clients look for it
        yield frame(failed(error).body())
        return
    usage = answer.usage([done[index] for index in sorted(done)], n_choices=n_choices)
    yield frames.closing(usage) + DONE


class EventStream(ASGIResponse):
    """Sends the frames; closes `events`, and so cancels the sequences, when the client leaves or it ends.

    `lasts_s`: seconds after which the connection is cut; the frames end before, unless nobody reads them.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        events: AsyncGenerator[Any, None],
        *,
        lasts_s: float | None = None,
    ) -> None:
        super().__init__(status_code=200)
        self._pieces = pieces
        self._events = events
        self._lasts_s = lasts_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, timeout=self._lasts_s, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._pieces.aclose()
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
