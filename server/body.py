"""Read a request's body within a limit, and notice when the client goes away."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from litestar import Request

from server.decode import decode
from server.errors import BodyTooLarge, ClientGone, NotJSON

T = TypeVar("T")

#: Thrown away of a body that is too large, so that the client reads the answer, not a reset connection.
DRAIN_BYTES = 512 * 2**20
DRAIN_S = 10.0


async def read(request: Request, wire_type: type[T], *, limit_bytes: int) -> T:
    """The decoded body; never holds more than `limit_bytes` of it."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        await _drain(request)
        raise NotJSON(content_type)
    return decode(await _read_bytes(request, limit_bytes), wire_type)


async def _read_bytes(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        await _drain(request)
        raise BodyTooLarge(limit_bytes)
    body = bytearray()
    while True:
        message: Any = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit_bytes:
            body.clear()
            if message.get("more_body"):
                await _drain(request)
            raise BodyTooLarge(limit_bytes)
        if not message.get("more_body"):
            return bytes(body)


async def _drain(request: Request) -> None:
    """Read and forget; a client that asked first (100-continue) is answered at once."""
    if request.headers.get("expect", "").lower() == "100-continue":
        return
    deadline = time.monotonic() + DRAIN_S
    forgotten = 0
    while forgotten < DRAIN_BYTES and (left := deadline - time.monotonic()) > 0:
        try:
            message: Any = await asyncio.wait_for(request.receive(), left)
        except TimeoutError:
            return
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return
        forgotten += len(message["body"])


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, cancelled as soon as the client closes the connection; raises ClientGone then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
