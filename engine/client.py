"""The asyncio handle of the engine: submit, stream, cancel, restart.

The event loop never waits for llama.cpp: messages go over a socket, events come back on queues. When the
process dies it is started again; requests that had begun get EngineRestarted, those that had not are sent
once more.
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
    Done,
    EngineConfig,
    EngineError,
    EngineInfo,
    EngineRestarted,
    EngineStats,
    EngineUnavailable,
    Event,
    GenerationRequest,
    Pooled,
    PooledRequest,
    Read,
    check_text,
)

RESTART_PAUSE_S = 1.0  # between two starts that failed, doubled each time
MAX_RESTART_PAUSE_S = 30.0
RESTART_WAIT_S = 60.0  # a request waits this long for a restart
_COUNTERS = (
    "requests_total",
    "cancelled_total",
    "failed_total",
    "prompt_tokens_total",
    "cached_tokens_total",
    "completion_tokens_total",
    "decode_steps_total",
    "busy_s",
    "preempted_total",
    "guessed_tokens_total",
    "right_guesses_total",
)


@dataclass(eq=False, slots=True)
class _Stream:
    """A request on its way and where its events go."""

    request: GenerationRequest | PooledRequest
    events: asyncio.Queue[Event | Read | Pooled | EngineError] = field(default_factory=asyncio.Queue)
    begun: bool = False  # something of it was answered; texts that were read can be read once more
    replayed: bool = False  # it has outlived a process


class Engine:
    """One model in one process. Make it with `start`, end it with `close`."""

    def __init__(self, config: EngineConfig, process: Process, info: EngineInfo) -> None:
        self.config = config
        self.info = info
        self._process = process
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._restarts = 0
        self._past: dict[str, float] = dict.fromkeys(_COUNTERS, 0)  # of processes that died
        self._latest: EngineStats | None = None  # of this process
        self._closed = False
        self._alive = True
        self._settled = asyncio.Event()  # the process runs, or it is known that it does not start
        self._settled.set()
        self._problem: EngineUnavailable | None = None
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

        Raises InvalidRequest, ContextOverflow, QueueFull, EngineRestarted or EngineUnavailable.
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
        await self._until_running()
        id, stream = next(self._ids), _Stream(request)
        self._streams[id] = stream
        self._process.send(wire.Submit(id, request))
        try:
            while True:
                event = await stream.events.get()
                if isinstance(event, EngineError):
                    raise event
                if isinstance(event, Done | Pooled):
                    del self._streams[id]
                    yield event
                    return
                yield event
        except EngineError:
            self._streams.pop(id, None)
            raise
        finally:
            if self._streams.pop(id, None) is not None:
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
        totals: dict[str, Any] = {name: getattr(stats, name) + self._past[name] for name in _COUNTERS}
        return replace(stats, **totals, restarts_total=self._restarts)

    async def close(self) -> None:
        """End the process; requests that still run get EngineUnavailable."""
        self._closed, self._alive = True, False
        self._settled.set()
        self._supervisor.cancel()
        # Cancelled just now, or ended before by a defect that `_unsupervised` has told.
        await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._process.stop()
        self._fail(EngineUnavailable("the engine was closed"), lambda _: True)

    async def _supervise(self) -> None:
        """Deliver replies; when the process dies, start another, for as long as the engine is open."""
        while True:
            await self._process.run(self._deliver)
            self._alive = False
            self._settled.clear()
            await self._process.stop()
            self._bury()
            await self._relaunch()
            for id, stream in self._streams.items():
                stream.replayed = True
                self._process.send(wire.Submit(id, stream.request))

    def _unsupervised(self, task: asyncio.Task[None]) -> None:
        """A defect ended the supervisor: nobody must wait for what will not come."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._alive = False
            self._settled.set()
            self._problem = EngineUnavailable(f"internal error: {type(error).__name__}: {error}")
            self._fail(self._problem, lambda _: True)
            context = {"message": "the engine's supervisor failed", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)

    def _bury(self) -> None:
        """Count what the dead process did; fail what it had begun, and what may have killed it twice."""
        self._restarts += 1
        if self._latest is not None:
            for name in _COUNTERS:
                self._past[name] += getattr(self._latest, name)
            self._latest = None
        error = EngineRestarted(
            f"the engine stopped while this request ran, send it again: {self._process.obituary()}"
        )
        self._fail(error, lambda stream: stream.begun or stream.replayed)

    async def _relaunch(self) -> None:
        pause_s = RESTART_PAUSE_S
        while True:
            try:
                self._process, self.info = await Process.launch(self.config)
            except (EngineError, OSError) as error:
                self._problem = EngineUnavailable(f"the engine cannot be started again: {error}")
                self._fail(self._problem, lambda _: True)
                self._settled.set()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RESTART_PAUSE_S)
            else:
                self._problem, self._alive = None, True
                self._settled.set()
                return

    def _deliver(self, reply: wire.Reply) -> None:
        match reply:
            case wire.Outputs(items, stats):
                for id, event in items:
                    stream = self._streams.get(id)
                    if stream is not None:  # else it was cancelled meanwhile
                        stream.begun = stream.begun or not isinstance(event, Read)
                        stream.events.put_nowait(event.error() if isinstance(event, wire.Failure) else event)
                self._latest = stats or self._latest
            case wire.Answer(id, value):
                future = self._answers.pop(id, None)
                if future is not None and not future.done():
                    if isinstance(value, wire.Failure):
                        future.set_exception(value.error())
                    else:
                        future.set_result(value)

    async def _ask(self, command: Callable[[int], wire.Command]) -> Any:
        await self._until_running()
        id = next(self._ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[id] = future
        self._process.send(command(id))
        try:
            return await future
        finally:
            self._answers.pop(id, None)

    async def _until_running(self) -> None:
        """Wait for a restart that is under way. Raises EngineUnavailable when there is none to wait for."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), RESTART_WAIT_S)
        if self._closed:
            raise EngineUnavailable("the engine was closed")
        if not self._alive:
            late = f"the engine did not come back within {RESTART_WAIT_S:.0f} s"
            raise EngineUnavailable(str(self._problem or late))

    def _fail(self, error: EngineError, whom: Callable[[_Stream], bool]) -> None:
        """End the streams that `whom` picks, and every question that waits for an answer."""
        for id, stream in list(self._streams.items()):
            if whom(stream):
                del self._streams[id]
                stream.events.put_nowait(error)
        for future in self._answers.values():
            if not future.done():
                future.set_exception(error)
        self._answers.clear()
