"""The engine's process: one model, one context, one loop, one socket to the client.

Single-threaded on purpose: a second busy Python thread would make every short native call wait for the GIL.
Between two steps it reads what has come, without waiting while there is work. It ends when the client does.
"""

import contextlib
import gc
import select
import signal
import socket
import sys
import time
from contextlib import ExitStack
from typing import Any

from engine import wire
from engine.black_box import BlackBox
from engine.defects import told
from engine.loading import load
from engine.loop import Loop
from engine.pooled import PooledLoop
from engine.request import (
    Delta,
    EngineError,
    Event,
    GenerationRequest,
    InvalidRequest,
    Pooled,
    PooledRequest,
    Read,
)
from engine.stats import EngineStats

MAX_MESSAGES = 1000  # read between two steps; what comes after waits for the next one
RECEIVE_BYTES = 1 << 16  # read at a time

# Text of fast streams is sent together, 40 times a second: each message costs the server 0.4 ms of a core
# that llama.cpp wants too. Nobody reads faster, and nothing waits that is a stream's first or last.
HOLD_S = 0.025

# Without a request for so long, it writes to disk what a crash would lose, one state after the other: a
# client that asks again at once waits for none of them, one that comes in the middle for one.
REST_S = 1.0


class ClientGone(Exception):
    """The other end of the socket was closed."""


class Channel:
    """Frames over a blocking socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()

    def send(self, reply: wire.Reply) -> None:
        try:
            self._connection.sendall(wire.frame(reply))
        except OSError as error:
            raise ClientGone from error

    def receive(self, *, wait_s: float | None = 0.0) -> list[Any]:
        """Every complete message that is there; `wait_s` for the first one, None: for as long as it takes."""
        messages: list[Any] = []
        if wait_s and not select.select([self._connection], [], [], wait_s)[0]:
            return messages
        while len(messages) < MAX_MESSAGES:
            forever = wait_s is None and not messages
            try:
                data = self._connection.recv(RECEIVE_BYTES, 0 if forever else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                raise ClientGone from error
            if not data:
                raise ClientGone
            self._buffer += data
            messages += wire.messages(self._buffer)
        return messages


def handle(command: wire.Command, loop: Loop | PooledLoop, channel: Channel) -> None:
    """Do what one message asks."""
    match command:
        case wire.Submit(id, request):
            try:
                submit(id, request, loop)
            except Exception as error:  # a request must not end the others
                channel.send(wire.Outputs([(id, wire.Failure.of(told(error)))]))
        case wire.Cancel(id):
            loop.cancel(id)
        case wire.Tokenize() | wire.Detokenize() | wire.AskStats():
            try:
                value = answer(command, loop)
            except Exception as error:  # nor may a question
                value = wire.Failure.of(told(error))
            channel.send(wire.Answer(command.id, value))


def submit(id: int, request: GenerationRequest | PooledRequest, loop: Loop | PooledLoop) -> None:
    """Queue a request; raises InvalidRequest when the loop is of another kind, or what the loop raises."""
    if isinstance(loop, PooledLoop):
        if not isinstance(request, PooledRequest):
            does = "ranks documents" if loop.kind == "rerank" else "embeds texts"
            raise InvalidRequest(f"this model {does} and writes none", field="prompt")
        loop.submit(id, request)
    elif isinstance(request, PooledRequest):
        raise InvalidRequest("this model writes text; it was not loaded to embed or rank any", field="input")
    else:
        loop.submit(id, request)


def answer(question: wire.Question, loop: Loop | PooledLoop) -> list[int] | str | EngineStats:
    """The value that was asked for."""
    match question:
        case wire.Tokenize(_, text, add_special, parse_special):
            return loop.model.tokenize(text, add_special=add_special, parse_special=parse_special)
        case wire.Detokenize(_, tokens):
            loop.check_tokens(tokens, field="tokens")
            return loop.model.detokenize(tokens)
        case wire.AskStats():
            return loop.stats()


def run(channel: Channel, box: BlackBox) -> None:
    """Load what the first message names, then serve until the client goes."""
    (start,) = channel.receive(wait_s=None)
    assert isinstance(start, wire.Start)
    with ExitStack() as stack:
        try:
            loop, info = load(start.config, stack)
        except EngineError as error:
            channel.send(wire.Failure.of(error))
            return
        channel.send(wire.Ready(info))
        gc.freeze()  # what is there now stays; the collector need not walk it between two tokens
        inbox, outbox = Inbox(channel, loop), Outbox(channel, loop)
        loop.note = box.note
        if isinstance(loop, Loop):
            loop.gets_on = box.tick
        while True:
            for command in inbox.next():
                box.note([command.id])
                handle(command, loop, channel)
            outbox.step()


class Inbox:
    """What comes, read between two steps; a long time without requests (`REST_S`) is made use of."""

    def __init__(self, channel: Channel, loop: Loop | PooledLoop) -> None:
        self._channel = channel
        self._loop = loop
        self._idle_s: float | None = None  # since when there is nothing to do, but to answer questions

    def next(self) -> list[wire.Asked]:
        """What has come; with nothing to do it waits for the first message."""
        if not self._loop.idle:
            self._idle_s = None
            return self._channel.receive()
        self._loop.note(())
        now_s = time.perf_counter()
        self._idle_s = self._idle_s or now_s
        wait_s: float | None = max(0.0, self._idle_s + REST_S - now_s)
        while not (commands := self._channel.receive(wait_s=wait_s)):
            wait_s = 0.0 if self._loop.rest() else None
        if any(isinstance(each, wire.Submit) for each in commands):
            self._idle_s = None
        return commands


class Outbox:
    """What steps gave, sent at once or held for `hold_s` at most, so that one message carries more."""

    def __init__(self, channel: Channel, loop: Loop | PooledLoop, *, hold_s: float = HOLD_S) -> None:
        self._channel = channel
        self._loop = loop
        self._hold_s = hold_s
        self._text: dict[int, Delta] = {}
        self._sent_s = 0.0

    def step(self) -> None:
        """One step of the loop. Text is held only over steps that are short: those without a prompt."""
        is_short = self._loop.only_writes
        if self._text and not is_short:
            self._send([], time.perf_counter())
        started = time.perf_counter()
        outputs = self._loop.step()
        if not outputs:
            return
        ends: list[tuple[int, Event | Read | Pooled | EngineError]] = []
        for id, event in outputs:
            assert isinstance(id, int)
            if type(event) is Delta:
                before = self._text.get(id)
                self._text[id] = event if before is None else before.joined(event)
            else:
                ends.append((id, event))
        now = time.perf_counter()
        next_s = now + (now - started)  # when the next step will have ended, more or less
        if ends or not is_short or next_s > self._sent_s + self._hold_s:
            self._send(ends, now)

    def _send(self, ends: list[tuple[int, Event | Read | Pooled | EngineError]], now: float) -> None:
        """One message with all text since the last one, and what ended requests."""
        items: list[tuple[int, Event | Read | Pooled | wire.Failure]] = list(self._text.items())
        for id, event in ends:
            items.append((id, wire.Failure.of(event) if isinstance(event, EngineError) else event))
        self._text.clear()
        self._sent_s = now
        self._channel.send(wire.Outputs(items, self._loop.stats() if ends else None))


def main() -> None:
    """Entry point: the arguments are the file descriptors of the socket and the black box."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client decides when to stop
    box = BlackBox(int(sys.argv[2]))
    with socket.socket(fileno=int(sys.argv[1])) as connection, contextlib.suppress(ClientGone):
        run(Channel(connection), box)


if __name__ == "__main__":
    main()
