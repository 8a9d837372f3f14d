"""Texts to vectors or scores, by an engine or by the embedder, within the limits of the key that asks.

What an engine refuses is told by the request's fields.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.request import InputTooLong, Kind, Pooled, PooledRequest, Read
from server.embedding import TooLong
from server.errors import BadRequest
from server.limits import Usage
from server.roster import Target
from server.service import Service
from server.ticket import Ticket


async def embed(
    service: Service, ticket: Ticket, model: str, texts: Sequence[str], *, dimensions: int | None = None
) -> Pooled:
    """An engine's vectors of texts, only the first `dimensions` of their numbers if given, of length 1.

    Raises what `Roster.lease` does, BadRequest, TooLong, Refused, or what the engine does.
    """
    async with _leased(service, ticket, model, kind="embedding") as target:
        width = target.engine.info.n_embd
        if dimensions is not None and dimensions > width:
            problem = f"dimensions: this model's vectors have {width} numbers, fewer than {dimensions}"
            raise BadRequest(problem, param="dimensions")
        request = PooledRequest(tuple(texts), tenant=ticket.policy.tenant)
        try:
            found = await _read_in_time(service, ticket, model, target.engine.pool(request))
        except InputTooLong as error:
            raise _too_long(error, "input", len(texts)) from None
    return found if dimensions is None else replace(found, values=shortened(found.values, dimensions))


async def embed_here(
    service: Service, ticket: Ticket, name: str, texts: Sequence[str], *, as_queries: bool
) -> Pooled:
    """The embedder's vectors of texts. Raises TooLong, EmbedderBusy or Refused."""
    tenant = ticket.policy.tenant
    events = service.embedders.embed(name, texts, as_queries=as_queries, tenant=tenant)
    return await _read_in_time(service, ticket, Path(name).name, events)


async def rerank(
    service: Service, ticket: Ticket, model: str, query: str, documents: Sequence[str]
) -> Pooled:
    """The scores of documents; raises what `embed` does."""
    async with _leased(service, ticket, model, kind="rerank") as target:
        request = PooledRequest(tuple(documents), query, tenant=ticket.policy.tenant)
        try:
            return await _read_in_time(service, ticket, model, target.engine.pool(request))
        except InputTooLong as error:
            raise _too_long(error, "documents", None) from None


def shortened(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first numbers of each vector, of length 1 again."""
    cut = vectors[:, :dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return cut / np.where(lengths > 0, lengths, 1)


@asynccontextmanager
async def _leased(service: Service, ticket: Ticket, model: str, *, kind: Kind) -> AsyncIterator[Target]:
    """The model with its engine; a wait for its load counts as one for the first token does."""
    roster = service.roster.on_behalf_of(ticket.policy.tenant)
    async with AsyncExitStack() as stack:
        lease = stack.enter_async_context(roster.lease(model, kind=kind))
        yield await ticket.in_time(lease, is_first=True)


async def _read_in_time(
    service: Service, ticket: Ticket, model: str, events: AsyncGenerator[Read | Pooled, None]
) -> Pooled:
    """The result, with what was read counted and charged on the way; the work ends when this does.

    The first texts that were read are what the first token is of a text that is written: until then `ttft_s`
    holds, over the waits for a load and in the queue.
    """
    is_first = True
    async with aclosing(events):
        while True:
            event = await ticket.in_time(anext(events), is_first=is_first)
            if isinstance(event, Pooled):
                ticket.settle(Usage((event.n_tokens,)))
                service.metrics.read(model, event.n_tokens)
                return event
            ticket.read(event.n_tokens)
            is_first = False


def _too_long(error: InputTooLong, field: str, n_texts: int | None) -> TooLong:
    """With the place in the request; a single input is no list."""
    place = field if n_texts == 1 else f"{field}[{error.index}]"
    return TooLong(place, error.size, error.limit, reader="model")
