"""An httpx transport into the application, without a socket, that streams as a server would.

httpx's own ASGITransport gathers the whole answer before it returns.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx

from server.gate import Gate

#: The base URL of clients; loopback by name, so that the Host check lets it in.
BASE_URL = "http://localhost"


class _Body(httpx.AsyncByteStream):
    """What the application sends, as it sends it; closing it is a client that goes away."""

    def __init__(
        self, chunks: "asyncio.Queue[bytes | None]", gone: asyncio.Event, task: asyncio.Task
    ) -> None:
        self._chunks = chunks
        self._gone = gone
        self._task = task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self._chunks.get()) is not None:
            yield chunk
        await self._task

    async def aclose(self) -> None:
        self._gone.set()
        await asyncio.gather(self._task, return_exceptions=True)


class InProcess(httpx.AsyncBaseTransport):
    """Use as httpx.AsyncClient(transport=InProcess(app), base_url=BASE_URL)."""

    def __init__(self, app: Gate) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        sent = [{"type": "http.request", "body": await request.aread(), "more_body": False}]
        gone = asyncio.Event()
        started: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        chunks: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def receive() -> Any:
            if sent:
                return sent.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                started.set_result(message)
                return
            if message.get("body"):
                chunks.put_nowait(message["body"])
            if not message.get("more_body"):
                chunks.put_nowait(None)
                gone.set()

        task = asyncio.ensure_future(self._app(_scope(request), receive, send))
        try:
            await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the caller goes away, and what it asked for with it
            gone.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        if not started.done():
            started.cancel()
            await task  # raises what the application raised
            raise httpx.RemoteProtocolError("the application sent nothing", request=request)
        start = started.result()
        return httpx.Response(start["status"], headers=start["headers"], stream=_Body(chunks, gone, task))


def _scope(request: httpx.Request) -> Any:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "server": (request.url.host, request.url.port),
        "client": ("127.0.0.1", 0),
        "root_path": "",
    }
