"""The asyncio handle of the engine: submit, stream, cancel, restart.

The event loop never waits for llama.cpp: messages go over a socket, events come back on queues.

When the process dies it is started again. Requests of which something was handed out get EngineRestarted,
but for replayable ones; all others are sent once more, however often it dies. Those that the process was busy
with when it died are suspects: they are sent first, one at a time and alone, so that one that kills is found
out without harm to others. Who was there at two deaths fails.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine import wire
from engine.process import Process
from engine.request import (
    Delta,
    Done,
    EngineConfig,
    EngineError,
    EngineInfo,
    EngineRestarted,
    EngineUnavailable,
    Event,
    GenerationRequest,
    Pooled,
    PooledRequest,
    Read,
    check_text,
)
from engine.stats import EngineStats

RESTART_PAUSE_S = 1.0  # between two starts that failed, doubled each time
MAX_RESTART_PAUSE_S = 30.0
RESTART_WAIT_S = 60.0  # requests wait so long while it cannot be started
TRIAL_S = 10.0  # a suspect is alone for so long at most, until its first token
MAX_DEATHS = 2  # of processes that were busy with a request; then it fails


@dataclass(eq=False, slots=True)
class _Stream:
    """A request on its way and where its events go."""

    request: GenerationRequest | PooledRequest
    events: asyncio.Queue[Event | Read | Pooled | EngineError] = field(default_factory=asyncio.Queue)
    begun: bool = False  # something of it was answered; texts that were read can be read once more
    sent: bool = False  # to the process that runs now
    deaths: int = 0  # of processes that were busy with it
    tried: asyncio.Event = field(default_factory=asyncio.Event)  # it was answered, or is gone

    @property
    def replayable(self) -> bool:
        """Whether it can be sent to another process."""
        return not self.begun or (isinstance(self.request, GenerationRequest) and self.request.replayable)


@dataclass(eq=False, slots=True)
class _Question:
    """A question on its way."""

    command: wire.Question
    answer: asyncio.Future[Any]
    deaths: int = 0


class Engine:
    """One model in one process. Make it with `start`, end it with `close`."""

    def __init__(self, config: EngineConfig, process: Process, info: EngineInfo) -> None:
        self.config = config
        self.info = info
        self._process = process
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._questions: dict[int, _Question] = {}
        self._restarts = 0
        self._past: EngineStats | None = None  # of processes that died
        self._latest: EngineStats | None = None  # of this process
        self._closed = False
        self._alive = True
        self._free = True  # requests are sent as they come: no suspect is to be alone
        self._problem: EngineUnavailable | None = None  # why the process does not start
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._unsupervised)

    @classmethod
    async def start(cls, config: EngineConfig) -> "Engine":
        """Start the process and load the model. Raises InvalidRequest or ModelLoadFailed."""
        config.validate()
        process, info = await Process.launch(config)
        return cls(config, process, info)

    @property
    def alive(self) -> bool:
        """Whether the process runs and its model is loaded."""
        return self._alive

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return self._process.pid

    def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request, the last a Done. Closing the generator cancels the request.

        Raises InvalidRequest, ContextOverflow, QueueFull, EngineRestarted or EngineUnavailable. Of a
        replayable request a Delta that says `anew` makes void what came before it.
        """
        return self._events(request)

    def pool(self, request: PooledRequest) -> AsyncGenerator[Read | Pooled, None]:
        """What an embedding or reranking model reads of a request, and at last what it makes of it: vectors,
        (texts, width) of length 1, or scores as it gives them. Closing the generator cancels the request.

        Raises InvalidRequest, InputTooLong, QueueFull, EngineRestarted or EngineUnavailable.
        """
        return self._events(request)

    async def _events(self, request: GenerationRequest | PooledRequest) -> AsyncGenerator[Any, None]:
        request.validate()
        self._check_open()
        id, stream = next(self._ids), _Stream(request)
        self._streams[id] = stream
        if self._free:
            self._send(id, stream)
        try:
            while True:
                event = await stream.events.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if isinstance(event, Done | Pooled):
                    return
        finally:
            stream.tried.set()
            if self._streams.pop(id, None) is not None:  # it has not ended
                self._process.send(wire.Cancel(id))

    async def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text."""
        check_text("text", text)
        return await self._ask(lambda id: wire.Tokenize(id, text, add_special, parse_special))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return await self._ask(lambda id: wire.Detokenize(id, tuple(tokens)))

    async def stats(self) -> EngineStats:
        """A snapshot; its counters run on over restarts."""
        stats: EngineStats = await self._ask(wire.AskStats)
        self._latest = stats
        return replace(stats.after(self._past), restarts_total=self._restarts)

    async def close(self) -> None:
        """End the process; requests that still run get EngineUnavailable."""
        self._closed, self._alive, self._free = True, False, False
        self._supervisor.cancel()
        # Cancelled just now, or ended before by a defect that `_unsupervised` has told.
        await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._process.stop()
        self._fail(EngineUnavailable("the engine was closed"))

    async def _supervise(self) -> None:
        """Deliver replies; when the process dies, start another, for as long as the engine is open."""
        while True:
            replay = asyncio.create_task(self._replay())
            replay.add_done_callback(self._unsupervised)
            try:
                await self._process.run(self._deliver)
            finally:
                replay.cancel()
            self._alive = self._free = False
            await self._process.stop()
            self._bury()
            await self._relaunch()

    async def _replay(self) -> None:
        """Send what waits for this process: suspects one by one, each alone until answered, then the rest."""
        for id, stream in list(self._streams.items()):
            if stream.deaths and id in self._streams:
                self._send(id, stream)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stream.tried.wait(), TRIAL_S)
        self._free = True
        for id, stream in self._streams.items():
            if not stream.sent:
                self._send(id, stream)

    def _send(self, id: int, stream: _Stream) -> None:
        stream.sent = True
        self._process.send(wire.Submit(id, stream.request))

    def _unsupervised(self, task: asyncio.Task[None]) -> None:
        """A defect ended the supervisor: nobody must wait for what will not come."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._alive = self._free = False
            self._problem = EngineUnavailable(f"internal error: {type(error).__name__}: {error}")
            self._fail(self._problem)
            context = {"message": "the engine's supervisor failed", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)

    def _bury(self) -> None:
        """Count what the dead process did; fail what was begun, and what was there when two died."""
        self._restarts += 1
        if self._latest is not None:
            self._past, self._latest = self._latest.after(self._past), None
        suspects, obituary = self._process.busy_with, self._process.obituary()
        again = EngineRestarted(f"the engine stopped while this request ran, send it again: {obituary}")
        twice = EngineRestarted(f"the engine stopped twice while it computed this request: {obituary}")
        for id, stream in list(self._streams.items()):
            stream.deaths += id in suspects
            if not stream.replayable:
                self._end(id, again)
            elif stream.deaths >= MAX_DEATHS:
                self._end(id, twice)
            elif stream.begun:
                stream.events.put_nowait(Delta("", (), anew=True))
            stream.begun = stream.sent = False
            stream.tried.clear()
        for id, question in list(self._questions.items()):
            question.deaths += id in suspects
            if question.deaths >= MAX_DEATHS:
                self._answer(id, twice)

    async def _relaunch(self) -> None:
        """Try until it starts. Those that came before are kept for a while, those that come now are told."""
        pause_s = RESTART_PAUSE_S
        now_s = asyncio.get_running_loop().time
        until_s = now_s() + RESTART_WAIT_S
        while True:
            try:
                self._process, self.info = await Process.launch(self.config)
            except (EngineError, OSError) as error:
                self._problem = EngineUnavailable(f"the engine cannot be started again: {error}")
                left_s = until_s - now_s()
                if left_s <= 0:
                    self._fail(self._problem)
                await asyncio.sleep(min(pause_s, left_s) if left_s > 0 else pause_s)
                pause_s = min(2 * pause_s, MAX_RESTART_PAUSE_S)
            else:
                self._problem, self._alive = None, True
                for question in self._questions.values():
                    self._process.send(question.command)
                return

    def _deliver(self, reply: wire.Reply) -> None:
        match reply:
            case wire.Outputs(items, stats):
                for id, event in items:
                    if isinstance(event, Delta | Read):
                        stream = self._streams.get(id)
                        if stream is not None:  # else it was cancelled meanwhile
                            stream.begun = stream.begun or isinstance(event, Delta)
                            stream.tried.set()
                            stream.events.put_nowait(event)
                    else:
                        self._end(id, event.error() if isinstance(event, wire.Failure) else event)
                self._latest = stats or self._latest
            case wire.Answer(id, value):
                self._answer(id, value.error() if isinstance(value, wire.Failure) else value)

    async def _ask(self, command: Callable[[int], wire.Question]) -> Any:
        self._check_open()
        id = next(self._ids)
        question = _Question(command(id), asyncio.get_running_loop().create_future())
        self._questions[id] = question
        if self._alive:
            self._process.send(question.command)
        try:
            return await question.answer
        finally:
            self._questions.pop(id, None)

    def _check_open(self) -> None:
        """Raise EngineUnavailable when the engine is closed or known not to start."""
        if self._closed:
            raise EngineUnavailable("the engine was closed")
        if self._problem is not None:
            raise EngineUnavailable(str(self._problem))

    def _end(self, id: int, last: Done | Pooled | EngineError) -> None:
        """The last that a stream hears; one that was cancelled meanwhile is none."""
        stream = self._streams.pop(id, None)
        if stream is not None:
            stream.tried.set()
            stream.events.put_nowait(last)

    def _answer(self, id: int, value: Any) -> None:
        question = self._questions.pop(id, None)
        if question is not None and not question.answer.done():
            if isinstance(value, EngineError):
                question.answer.set_exception(value)
            else:
                question.answer.set_result(value)

    def _fail(self, error: EngineError) -> None:
        """End all streams and questions."""
        for id in list(self._streams):
            self._end(id, error)
        for id in list(self._questions):
            self._answer(id, error)
