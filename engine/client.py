"""The asyncio handle of the engine process: submit, stream, cancel, restart.

The event loop never waits for llama.cpp: messages go over a socket, events come back on queues. When the
process dies it is started again; requests that had begun get EngineRestarted, those that had not are sent once more.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine import wire
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
    ModelLoadFailed,
)

RESTART_PAUSE_S = 1.0  # between two starts that failed
STOP_S = 5.0  # the process gets this long to end by itself
_STDERR_KEPT = 4000  # bytes of the process's last words


@dataclass(eq=False, slots=True)
class _Stream:
    """A request on its way and where its events go."""

    request: GenerationRequest
    events: asyncio.Queue[Event | EngineError] = field(default_factory=asyncio.Queue)
    begun: bool = False
    replayed: bool = False


class Engine:
    """One model in one process. Make it with `start`, end it with `close`."""

    info: EngineInfo

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._restarts = 0
        self._past: EngineStats | None = None
        self._latest: EngineStats | None = None
        self._closed = False
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._last_words = b""
        self._running = asyncio.Event()
        self._problem: EngineError | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, config: EngineConfig) -> "Engine":
        """Start the process and load the model. Raises InvalidRequest or ModelLoadFailed."""
        config.validate()
        engine = cls(config)
        reader = await engine._launch()
        engine._tasks.append(asyncio.create_task(engine._supervise(reader)))
        return engine

    @property
    def alive(self) -> bool:
        """Whether the process runs and its model is loaded."""
        return self._running.is_set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request, the last a Done. Closing the generator cancels the request.

        Raises InvalidRequest, ContextOverflow, QueueFull, EngineRestarted or EngineUnavailable.
        """
        request.validate()
        await self._wait_until_running()
        id, stream = next(self._ids), _Stream(request)
        self._streams[id] = stream
        self._send(wire.Submit(id, request))
        try:
            while True:
                event = await stream.events.get()
                if isinstance(event, EngineError):
                    raise event
                if isinstance(event, Done):
                    self._streams.pop(id, None)
                    yield event
                    return
                yield event
        finally:
            if self._streams.pop(id, None) is not None:
                self._send(wire.Cancel(id))

    async def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text."""
        return await self._ask(lambda id: wire.Tokenize(id, text, add_special, parse_special))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return await self._ask(lambda id: wire.Detokenize(id, tuple(tokens)))

    async def stats(self) -> EngineStats:
        """A snapshot; its counters run on over restarts."""
        self._latest = await self._ask(wire.AskStats)
        return self._summed(self._latest)

    async def close(self) -> None:
        """End the process; requests that still run get EngineUnavailable."""
        self._closed = True
        self._running.clear()
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), STOP_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all(EngineUnavailable("the engine was closed"))

    # -- the process ------------------------------------------------------------------------------------

    async def _launch(self) -> asyncio.StreamReader:
        """Start a process and wait until its model is loaded; returns where its replies come from."""
        ours, theirs = socket.socketpair()
        with theirs:
            root = str(Path(__file__).parents[1])
            path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "engine.worker", str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C in the terminal is for the server, which then closes us
            )  # fmt: skip
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 26)
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(self._listen(self._process)))
        self._send(wire.Start(self.config))
        try:
            reply = await self._receive(reader)
        except asyncio.IncompleteReadError:
            await self._process.wait()
            raise ModelLoadFailed(f"{self.config.model_path}: {self._obituary()}") from None
        if isinstance(reply, wire.Failure):
            raise reply.error()
        assert isinstance(reply, wire.Ready)
        self.info = reply.info
        self._problem = None
        self._running.set()
        return reader

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        """Deliver replies; when the process dies, start another, for as long as the engine is open."""
        while not self._closed:
            try:
                while True:
                    self._deliver(await self._receive(reader))
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            self._running.clear()
            if self._closed:
                return
            assert self._process is not None
            await self._process.wait()
            self._restarts += 1
            if self._latest is not None:
                self._past, self._latest = self._summed(self._latest), None
            self._fail_begun(
                EngineRestarted(f"the engine stopped while this request ran: {self._obituary()}")
            )
            reader = await self._relaunch()
            self._replay()

    async def _relaunch(self) -> asyncio.StreamReader:
        while True:
            try:
                return await self._launch()
            except (EngineError, OSError) as error:
                self._problem = EngineUnavailable(f"the engine cannot be started again: {error}")
                self._fail_all(self._problem)
                await asyncio.sleep(RESTART_PAUSE_S)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Keep the process's last words, such as a failed assertion in native code."""
        assert process.stderr is not None
        self._last_words = b""
        while data := await process.stderr.read(4096):
            self._last_words = (self._last_words + data)[-_STDERR_KEPT:]

    def _obituary(self) -> str:
        """How the process ended, in one line."""
        code = self._process.returncode if self._process else None
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        lines = self._last_words.decode("utf-8", "replace").strip().splitlines()
        return f"its process ended ({how}){': ' + lines[-1] if lines else ''}"

    # -- messages ---------------------------------------------------------------------------------------

    def _send(self, command: wire.Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.frame(command))

    async def _receive(self, reader: asyncio.StreamReader) -> wire.Reply:
        (size,) = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
        return wire.message(await reader.readexactly(size))

    def _deliver(self, reply: wire.Reply) -> None:
        match reply:
            case wire.Outputs(items):
                for id, event in items:
                    stream = self._streams.get(id)
                    if stream is not None:
                        stream.begun = True
                        stream.events.put_nowait(event.error() if isinstance(event, wire.Failure) else event)
            case wire.Answer(id, value):
                future = self._answers.pop(id, None)
                if future is not None and not future.done():
                    future.set_result(value)

    async def _ask(self, command: Any) -> Any:
        await self._wait_until_running()
        id = next(self._ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[id] = future
        self._send(command(id))
        try:
            return await future
        finally:
            self._answers.pop(id, None)

    async def _wait_until_running(self) -> None:
        """Wait for a restart that is under way; raises EngineUnavailable when there is none to wait for."""
        if self._closed:
            raise EngineUnavailable("the engine was closed")
        if not self._running.is_set():
            if self._problem is not None:
                raise self._problem
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._running.wait(), 60)
        if not self._running.is_set():
            raise self._problem or EngineUnavailable("the engine did not come back within 60 s")

    def _replay(self) -> None:
        """Send requests again that the last process had not answered at all."""
        for id, stream in self._streams.items():
            stream.replayed = True
            self._send(wire.Submit(id, stream.request))

    def _fail_begun(self, error: EngineError) -> None:
        """Fail what was answered in part, and what has outlived two processes (it may be what kills them)."""
        for id, stream in list(self._streams.items()):
            if stream.begun or stream.replayed:
                del self._streams[id]
                stream.events.put_nowait(error)
        self._fail_answers(error)

    def _fail_all(self, error: EngineError) -> None:
        for stream in self._streams.values():
            stream.events.put_nowait(error)
        self._streams.clear()
        self._fail_answers(error)

    def _fail_answers(self, error: EngineError) -> None:
        for future in self._answers.values():
            if not future.done():
                future.set_exception(error)
        self._answers.clear()

    def _summed(self, stats: EngineStats) -> EngineStats:
        """The snapshot with the counters of earlier processes added."""
        past = self._past
        totals = {
            name: getattr(stats, name) + (getattr(past, name) if past else 0)
            for name in EngineStats.__dataclass_fields__
            if name.endswith("_total") or name in ("busy_s",)
        }
        totals.pop("kv_cells_total")
        return replace(stats, **totals | {"restarts_total": self._restarts})
