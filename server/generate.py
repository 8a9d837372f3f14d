"""Run the choices of one request and merge their events; knows neither HTTP nor wire types."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from engine.request import Done, EngineRestarted, Event, GenerationRequest
from server.engines import Engine


async def events(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, Event], None]:
    """(choice, event) as they come, each choice ending in Done; closing this cancels every choice."""
    source = _one(engine, requests[0]) if len(requests) == 1 else _many(engine, requests)
    async with aclosing(source):
        async for index, event in source:
            if isinstance(event, Done) and event.finish_reason == "cancelled":
                raise EngineRestarted("the request was cancelled because the server stops")
            yield index, event


async def _one(engine: Engine, request: GenerationRequest) -> AsyncGenerator[tuple[int, Event], None]:
    async with aclosing(engine.submit(request)) as stream:  # pyright: ignore[reportArgumentType]
        async for event in stream:
            yield 0, event


async def _many(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, Event], None]:
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def pump(index: int, request: GenerationRequest) -> None:
        try:
            async for _, event in _one(engine, request):
                await queue.put((index, event))
        except Exception as error:  # handed to the reader, which raises it and so cancels the other choices
            await queue.put((index, error))

    tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    try:
        left = len(tasks)
        while left:
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Done)
            yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
