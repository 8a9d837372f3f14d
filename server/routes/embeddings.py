"""POST /v1/embeddings."""

import base64

import numpy as np
from litestar import Request, post
from litestar.response.base import ASGIResponse

from server.body import read, unless_gone
from server.errors import BadRequest
from server.limits import Usage
from server.routes.completing import json_response
from server.schema.embedding import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from server.service import Service

#: About what English has; how many there are is known when they have been embedded.
CHARACTERS_PER_TOKEN = 4


@post("/v1/embeddings", status_code=200, tags=["embeddings"])
async def embeddings(request: Request) -> ASGIResponse:
    """Vectors of texts, of length 1."""
    service: Service = request.app.state.service
    body = await read(request, EmbeddingRequest, limit_bytes=service.limit_bytes)
    name = service.roster.embedder(body.model)
    texts = _texts(body)
    ticket = service.admit(request.scope)
    ticket.reserve_guess(sum(map(len, texts)) // CHARACTERS_PER_TOKEN)
    work = service.embedders.embed(name, texts, as_queries=body.input_type == "query")
    vectors, n_tokens = await unless_gone(request, ticket.in_time(work, is_first=False))
    ticket.settle(Usage((n_tokens,)))
    as_base64 = body.encoding_format == "base64"
    data = [Embedding(index=n, embedding=_encoded(row, as_base64)) for n, row in enumerate(vectors)]
    usage = EmbeddingUsage(prompt_tokens=n_tokens, total_tokens=n_tokens)
    return json_response(EmbeddingList(data=data, model=body.model, usage=usage))


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
