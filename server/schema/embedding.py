"""POST /v1/embeddings."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from server.schema.sampling import Name, Positive

#: As many inputs as OpenAI takes.
MAX_INPUTS = 2048
Text = Annotated[str, Meta(min_length=1)]
Token = Annotated[int, Meta(ge=0)]


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """OpenAI's request, and `input_type`, for embedders that treat queries and documents differently."""

    model: Name
    input: Text | Annotated[list[Text | Token | list[Token]], Meta(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    input_type: Literal["document", "query"] = "document"
    dimensions: Positive | None = None  # of embedding models in GGUF: the first so many, of length 1 again
    user: str | None = None


class Embedding(msgspec.Struct, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
