"""Ask the engine of an embedding or reranking model; what it refuses is told by the request's fields."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.request import InputTooLong, Pooled
from server.embedding import TooLong
from server.errors import BadRequest
from server.service import Service

#: About what English has; how many there are is known when they have been read.
CHARACTERS_PER_TOKEN = 4


async def embed(
    service: Service, model: str, texts: Sequence[str], *, dimensions: int | None = None
) -> Pooled:
    """The vectors of texts, only the first `dimensions` of their numbers if given, of length 1.

    Raises what `Roster.lease` does, BadRequest, TooLong, or what the engine does.
    """
    try:
        async with service.roster.lease(model, kind="embedding") as target:
            width = target.engine.info.n_embd
            if dimensions is not None and dimensions > width:
                problem = f"dimensions: this model's vectors have {width} numbers, fewer than {dimensions}"
                raise BadRequest(problem, param="dimensions")
            found = await target.engine.embed(texts)
    except InputTooLong as error:
        raise _too_long(error, "input", len(texts)) from None
    service.metrics.read(model, found.n_tokens)
    return found if dimensions is None else replace(found, values=shortened(found.values, dimensions))


def shortened(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first numbers of each vector, of length 1 again."""
    cut = vectors[:, :dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return cut / np.where(lengths > 0, lengths, 1)


async def rerank(service: Service, model: str, query: str, documents: Sequence[str]) -> Pooled:
    """The scores of documents; raises what `embed` does."""
    try:
        async with service.roster.lease(model, kind="rerank") as target:
            found = await target.engine.rerank(query, documents)
    except InputTooLong as error:
        raise _too_long(error, "documents", None) from None
    service.metrics.read(model, found.n_tokens)
    return found


def _too_long(error: InputTooLong, field: str, n_texts: int | None) -> TooLong:
    """With the place in the request; a single input is no list."""
    place = field if n_texts == 1 else f"{field}[{error.index}]"
    return TooLong(place, error.size, error.limit, reader="model")
