"""POST /v1/rerank, and /rerank, where Jina's and Cohere's clients look for it."""

import numpy as np
from litestar import Request, post
from litestar.response.base import ASGIResponse

from server.body import read, unless_gone
from server.embedding import CHARACTERS_A_TOKEN
from server.pooling import rerank
from server.routes.completing import json_response
from server.schema.embedding import EmbeddingUsage
from server.schema.rerank import Document, RerankList, RerankRequest, RerankResult
from server.service import Service


@post(["/v1/rerank", "/rerank"], status_code=200, tags=["rerank"])
async def rerank_documents(request: Request) -> ASGIResponse:
    """Scores of documents for a query, the best first."""
    service: Service = request.app.state.service
    body = await read(request, RerankRequest, limit_bytes=service.limit_bytes)
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    service.roster.get(body.model, kind="rerank")
    ticket = service.admit(request.scope)
    n_characters = sum(map(len, texts)) + len(texts) * len(body.query)
    ticket.reserve_guess(n_characters // CHARACTERS_A_TOKEN)
    scored = await unless_gone(request, rerank(service, ticket, body.model, body.query, texts))
    results = [
        RerankResult(index=int(index), relevance_score=float(scored.values[index]))
        for index in np.argsort(-scored.values, kind="stable")[: body.top_n]
    ]
    if body.return_documents:
        for result in results:
            result.document = Document(text=texts[result.index])
    usage = EmbeddingUsage(prompt_tokens=scored.n_tokens, total_tokens=scored.n_tokens)
    return json_response(RerankList(model=body.model, results=results, usage=usage))
