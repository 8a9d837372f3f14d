"""POST /v1/rerank, as Jina, Cohere and llama-server have it."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from server.schema.embedding import MAX_INPUTS, EmbeddingUsage, Text
from server.schema.sampling import Name, Positive


class Document(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    text: Text


class RerankRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Documents to be put in the order of how well they answer a query."""

    model: Name
    query: Text
    documents: Annotated[list[Text | Document], Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Positive | None = None  # null: all
    return_documents: bool = False


class RerankResult(msgspec.Struct, kw_only=True):
    """`relevance_score` is the model's own number: higher is better; what is high differs between models."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class RerankList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]  # the best first
    usage: EmbeddingUsage
