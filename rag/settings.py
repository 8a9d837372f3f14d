"""What a collection is built with, and the refusal to mix two ways of building.

Vectors of two models, or chunks of two lengths, must never share an index; the refusal carries its repair.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rag.errors import RagError
from rag.lexical import Mode

CHUNK_TOKENS = 512
OVERLAP = 64
CHUNK_RANGE = (100, 2000)


@dataclass(frozen=True, slots=True)
class Settings:
    """Fixed when a collection is created; `embedder` is a name, the fingerprint decides."""

    embedder: str
    embedder_fingerprint: str
    dimension: int
    chunk_tokens: int
    overlap: int
    lexical: Mode
    reads_hangul: bool  # whether the embedder's vocabulary has Korean words, not only letters


class InvalidChunks(RagError):
    """Chunk lengths that cannot be."""


class OtherEmbedder(RagError):
    def __init__(self, name: str, roots: Sequence[str], built: Settings, *, given: str, mark: str) -> None:
        repair = rebuild_command(name, roots, embedder=given)
        if given == built.embedder:
            super().__init__(
                f"collection {name!r}: the files of its embedder {given!r} are not those it was built with "
                f"({mark}, not {built.embedder_fingerprint}): they are damaged or another model's; put them "
                f"back, or build the collection again with: {repair}"
            )
            return
        super().__init__(
            f"collection {name!r} was built with the embedder {built.embedder!r} "
            f"({built.embedder_fingerprint}), not {given!r} ({mark}): their vectors do not compare; "
            f"use --embedder {shlex.quote(built.embedder)}, or build it again with: {repair}"
        )


class LostEmbedder(RagError):
    def __init__(
        self, name: str, roots: Sequence[str], built_with: str, *, instead: str, why: object
    ) -> None:
        repair = rebuild_command(name, roots, embedder=instead)
        super().__init__(
            f"collection {name!r} was built with the embedder {built_with!r}, which cannot be had: {why}; "
            f"put it back, or build the collection again with another one: {repair}"
        )


class OtherChunks(RagError):
    def __init__(
        self, name: str, roots: Sequence[str], built: Settings, *, tokens: int, overlap: int
    ) -> None:
        repair = rebuild_command(name, roots, tokens=tokens, overlap=overlap)
        super().__init__(
            f"collection {name!r} has chunks of {built.chunk_tokens} tokens with {built.overlap} "
            f"overlapping, not {tokens} with {overlap}; leave the options out, or build it again with: "
            f"{repair}"
        )


def rebuild_command(
    name: str,
    roots: Sequence[str],
    *,
    embedder: str | None = None,
    tokens: int | None = None,
    overlap: int | None = None,
) -> str:
    """The `lq index` that builds a collection again, ready to paste."""
    words = ["lq", "index", name, *(roots or ("PATH...",))]
    if embedder is not None:
        words += ["--embedder", embedder]
    if tokens is not None and overlap is not None:
        words += ["--chunk-tokens", str(tokens), "--overlap", str(overlap)]
    return " ".join(word if word == "PATH..." else shlex.quote(word) for word in [*words, "--rebuild"])


def check_chunks(chunk_tokens: int, overlap: int) -> None:
    """Raise InvalidChunks unless the lengths make sense together."""
    low, high = CHUNK_RANGE
    if not low <= chunk_tokens <= high:
        raise InvalidChunks(f"--chunk-tokens {chunk_tokens} is out of range: give {low} to {high} tokens")
    if not 0 <= 2 * overlap < chunk_tokens:
        raise InvalidChunks(
            f"--overlap {overlap} is out of range: give 0 to {(chunk_tokens - 1) // 2} tokens, "
            "less than half a chunk"
        )
