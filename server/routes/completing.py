"""What both kinds of completion do: read, prepare, run, and answer whole or as a stream."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.response.base import ASGIResponse

from server import answer, stream
from server.answer import Collected, Envelope
from server.body import read, unless_gone
from server.errors import BadRequest
from server.roster import Roster
from server.schema.sampling import GenerationFields
from server.service import Service, fingerprint
from server.ticket import Ticket
from server.work import Work

Body = TypeVar("Body", bound=GenerationFields)


async def complete(
    request: Request,
    wire_type: type[Body],
    prepare: Callable[[Roster, Body], Awaitable[Work]],
    *,
    prefix: str,
    frames: Callable[..., stream.ChatFrames | stream.TextFrames],
    whole: Callable[..., Any],
) -> ASGIResponse:
    """The response; a client that leaves cancels its sequences at once, whatever they were at."""
    service: Service = request.app.state.service
    body = await read(request, wire_type, limit_bytes=service.limit_bytes)
    if body.stream_options and not body.stream:
        raise BadRequest("stream_options needs `stream: true`", param="stream_options")
    ticket = service.admit(request.scope)
    envelope = Envelope.new(prefix, body.model, fingerprint())
    if not body.stream:
        collected = await unless_gone(request, _collect(service, body, prepare, ticket))
        work, choices = collected
        done = [choice.done for choice in choices if choice.done]
        usage = answer.usage(done, n_choices=body.n or 1)
        return json_response(whole(envelope, work, choices, usage))
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    work, events, first = await unless_gone(request, _begin(service, body, prepare, ticket))
    shaped = frames(envelope, work, include_usage=include_usage)
    failed = partial(service.failed, scope=request.scope)
    pieces = stream.body(first, events, shaped, n_choices=body.n or 1, failed=failed)
    return stream.EventStream(pieces, events, lasts_s=ticket.lasts_s)


async def _collect(service: Service, body: Any, prepare: Any, ticket: Ticket) -> tuple[Work, list[Collected]]:
    roster = service.roster.on_behalf_of(ticket.policy.tenant)
    work = await ticket.in_time(prepare(roster, body), is_first=True)
    choices = [Collected() for _ in work.requests]
    async with aclosing(service.run(work, ticket)) as events:
        async for index, event in events:
            choices[index].add(event)
    return work, choices


async def _begin(service: Service, body: Any, prepare: Any, ticket: Ticket):
    """Up to the first event, so that errors of the request still have their own status."""
    roster = service.roster.on_behalf_of(ticket.policy.tenant)
    work = await ticket.in_time(prepare(roster, body), is_first=True)
    events = service.run(work, ticket)
    try:
        return work, events, await anext(events)
    except BaseException:
        await events.aclose()
        raise


def json_response(value: Any, *, status: int = 200) -> ASGIResponse:
    return ASGIResponse(body=msgspec.json.encode(value), status_code=status, media_type="application/json")
