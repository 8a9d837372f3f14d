"""One run of the engine's process: start it, talk to it in frames, learn how it ended.

It runs `python -m engine.worker` with one end of a socket pair; when either side goes, the other sees it.
Restarts and requests are client.py's.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from engine import black_box, wire
from engine.black_box import BlackBox
from engine.memory import environment
from engine.request import EngineConfig, EngineInfo, ModelLoadFailed

STOP_S = 5.0  # the process gets this long to end by itself, and again for as long as it gets on
_STDERR_KEPT = 4000  # bytes of the process's last words


Deliver = Callable[[wire.Reply], None]


class _Replies(asyncio.Protocol):
    """Hands over each message as it comes: a stream reader would wake one task more for every token."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[wire.Reply | None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.deliver: Deliver = self.first.set_result

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            for reply in wire.messages(self._buffer):
                self.deliver(reply)
        except Exception as error:  # a defect of the receiver: whoever waits for the end must hear of it
            if not self.ended.done():
                self.ended.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        for waiting in (self.first, self.ended):
            if not waiting.done():
                waiting.set_result(None)


class Process:
    """A running worker with its model loaded; made by `launch`."""

    def __init__(self, child: asyncio.subprocess.Process, box: BlackBox) -> None:
        self._child = child
        self._box = box
        self._last_words = b""
        self._listener = asyncio.create_task(self._listen())
        self._transport: asyncio.Transport | None = None
        self._replies = _Replies()

    @classmethod
    async def launch(cls, config: EngineConfig) -> tuple["Process", EngineInfo]:
        """Start a process and wait until its model is loaded. Raises ModelLoadFailed."""
        ours, theirs = socket.socketpair()
        page = black_box.make()
        try:
            with theirs:
                process = cls(await _spawn(theirs, page), BlackBox(page))
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(page)
        try:
            loop = asyncio.get_running_loop()
            process._transport, _ = await loop.create_connection(lambda: process._replies, sock=ours)
            process.send(wire.Start(config))
            reply = await process._replies.first
        except BaseException:
            process.kill()
            await process.stop()
            raise
        if reply is None:
            await process.stop()
            raise ModelLoadFailed(f"{config.model_path}: {process.obituary()}")
        if isinstance(reply, wire.Failure):
            await process.stop()
            raise reply.error()
        assert isinstance(reply, wire.Ready)
        return process, reply.info

    @property
    def pid(self) -> int | None:
        """None once it has ended."""
        return self._child.pid if self._child.returncode is None else None

    @property
    def busy_with(self) -> frozenset[int]:
        """Ids of what it works on; once it has ended, of what it died of, if of any."""
        return self._box.ids

    def send(self, command: wire.Command) -> None:
        """Queue a message; one to a process that ended is lost."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.frame(command))

    async def run(self, deliver: Deliver) -> None:
        """Hand every further message to `deliver` until the process ends; raises what `deliver` raises."""
        self._replies.deliver = deliver
        await asyncio.shield(self._replies.ended)

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()

    async def stop(self) -> None:
        """Close the socket, upon which it ends by itself; wait, and kill it when it does not.

        A large cache on a slow disk takes its time: it has `STOP_S` for every state that it writes.
        """
        if self._transport is not None:
            self._transport.close()
        n_notes = -1
        while self._box.n_notes > n_notes:
            n_notes = self._box.n_notes
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._child.wait(), STOP_S)
                break
        else:
            self.kill()
            await self._child.wait()
        await self._listener

    def obituary(self) -> str:
        """How the process ended, in one line."""
        code = self._child.returncode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        lines = self._last_words.decode("utf-8", "replace").strip().splitlines()
        return f"its process ended ({how}){': ' + lines[-1] if lines else ''}"

    async def _listen(self) -> None:
        """Keep the process's last words, such as a failed assertion in native code."""
        assert self._child.stderr is not None
        while data := await self._child.stderr.read(4096):
            self._last_words = (self._last_words + data)[-_STDERR_KEPT:]


async def _spawn(theirs: socket.socket, page: int) -> asyncio.subprocess.Process:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "engine.worker", str(theirs.fileno()), str(page),
        pass_fds=[theirs.fileno(), page],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment(os.environ) | {"PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"},
        start_new_session=True,  # Ctrl-C in the terminal is for the server, which then closes us
    )  # fmt: skip
