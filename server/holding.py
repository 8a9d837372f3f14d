"""The engine of one request: taken before the request is prepared, given back when its answer is out.

Preparing asks the engine for tokens and running asks it for text; in between nobody may unload it.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from server.roster import Roster
from server.stream import EventStream
from server.work import Work

Prepare = Callable[[Roster, Any], Awaitable[Work]]


class Holding:
    """Holds the lease of the model that a request names, once it is known, until the `with` block ends.

    `until_sent` keeps it for a stream that goes on after the block.
    """

    def __init__(self) -> None:
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def before(self, prepare: Prepare) -> Prepare:
        """The same preparation, with the engine of `body.model` there."""

        async def prepared(roster: Roster, body: Any) -> Work:
            await self._stack.enter_async_context(roster.lease(body.model))
            return await prepare(roster, body)

        return prepared

    def until_sent(self, response: ASGIResponse) -> ASGIResponse:
        """The response; a whole answer needs the engine no more."""
        return _Held(response, self._stack.pop_all()) if isinstance(response, EventStream) else response


class _Held(ASGIResponse):
    """A stream that gives the engine back at its end, however it ends."""

    def __init__(self, response: ASGIResponse, stack: AsyncExitStack) -> None:
        super().__init__(status_code=response.status_code)
        self._response = response
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await self._response(scope, receive, send)
