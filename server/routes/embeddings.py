"""POST /v1/embeddings."""

import base64
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import numpy as np
from litestar import Request, post
from litestar.response.base import ASGIResponse

from engine.request import Pooled
from server.body import read, unless_gone
from server.embedding import CHARACTERS_A_TOKEN
from server.errors import BadRequest
from server.pooling import embed, embed_here
from server.routes.completing import json_response
from server.schema.embedding import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from server.schema.refused import REASONS
from server.service import Service
from server.ticket import Ticket


@post("/v1/embeddings", status_code=200, tags=["embeddings"])
async def embeddings(request: Request) -> ASGIResponse:
    """Vectors of texts, of length 1."""
    service: Service = request.app.state.service
    body = await read(request, EmbeddingRequest, limit_bytes=service.limit_bytes)
    texts = _texts(body)
    work = _prepared(service, body, texts)
    ticket = service.admit(request.scope)
    ticket.reserve_guess(sum(map(len, texts)) // CHARACTERS_A_TOKEN)
    found = await unless_gone(request, work(service, ticket))
    as_base64 = body.encoding_format == "base64"
    data = [Embedding(index=n, embedding=_encoded(row, as_base64)) for n, row in enumerate(found.values)]
    usage = EmbeddingUsage(prompt_tokens=found.n_tokens, total_tokens=found.n_tokens)
    return json_response(EmbeddingList(data=data, model=body.model, usage=usage))


def _prepared(
    service: Service, body: EmbeddingRequest, texts: list[str]
) -> Callable[[Service, Ticket], Coroutine[Any, Any, Pooled]]:
    """The work, not begun: by an engine for a model in GGUF, else by the embedder."""
    if service.roster.is_embedding(body.model):
        if body.input_type == "query":
            raise BadRequest(
                "input_type: this model knows no difference between queries and documents; leave it out, and "
                "write the prefix that the model's authors want before the text",
                param="input_type",
                code="unsupported_value",
            )
        return partial(embed, model=body.model, texts=texts, dimensions=body.dimensions)
    name = service.roster.embedder(body.model)
    if body.dimensions is not None:
        raise BadRequest(
            f"dimensions: {REASONS['dimensions']}", param="dimensions", code="unsupported_parameter"
        )
    return partial(embed_here, name=name, texts=texts, as_queries=body.input_type == "query")


def _texts(body: EmbeddingRequest) -> list[str]:
    inputs = [body.input] if isinstance(body.input, str) else body.input
    for item in inputs:
        if not isinstance(item, str):
            raise BadRequest(
                "input: token ids are those of another tokenizer; send texts "
                "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
                param="input",
                code="unsupported_value",
            )
    return [item for item in inputs if isinstance(item, str)]


def _encoded(row: np.ndarray, as_base64: bool) -> list[float] | str:
    """Little-endian float32 in base64, as OpenAI's own clients ask for by default."""
    if as_base64:
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    return row.tolist()
