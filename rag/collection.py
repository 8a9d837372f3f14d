"""A collection: one folder on disk that answers questions with passages.

Owns opening, searching and checking; `ingest` fills it. Knows nothing of stores of models or of HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rag.errors import RagError
from rag.passage import Passage

__all__ = ["Collection", "CollectionInfo", "Passage", "UnknownCollection"]


class QueryEmbedder(Protocol):
    """What a search asks of an embedder (rag.embed.Embedder is one)."""

    fingerprint: str
    name: str

    def queries(self, texts: Sequence[str]) -> np.ndarray: ...


class UnknownCollection(RagError):
    def __init__(self, name: str, known: Sequence[str]) -> None:
        listed = f"known: {', '.join(known)}" if known else "there are none yet"
        super().__init__(f"no collection {name!r} ({listed}); build it with: lq index {name} PATH...")
        self.name = name


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    name: str
    embedder: str  # the name it was indexed with: a store name or a folder; resolve it to load the Embedder
    embedder_fingerprint: str
    dimension: int
    chunk_tokens: int
    overlap: int
    lexical: str
    roots: tuple[str, ...]
    n_files: int
    n_skipped: int
    n_chunks: int
    n_vectors: int


class Collection:
    """Safe to share between threads: a search takes a lock (a few ms)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def open(cls, directory: Path) -> "Collection":
        """An existing collection; UnknownCollection lists the folder's siblings otherwise."""
        raise UnknownCollection(directory.name, names(directory.parent))

    def search(self, question: str, *, k: int = 5, embedder: QueryEmbedder) -> list[Passage]:
        """The k best passages, best first; refuses an embedder other than the one it was built with."""
        raise UnknownCollection(question, ())

    def info(self) -> CollectionInfo:
        raise UnknownCollection(self.directory.name, ())

    def verify(self) -> list[str]:
        """What is inconsistent, one sentence each; empty when sound."""
        raise UnknownCollection(self.directory.name, ())

    def repair(self) -> list[str]:
        """Mend what verify finds; says what was done."""
        raise UnknownCollection(self.directory.name, ())

    def close(self) -> None: ...


def names(root: Path) -> list[str]:
    """Collections under a folder (`LQ_HOME/collections`), sorted."""
    return sorted(path.parent.name for path in root.glob("*/collection.sqlite"))
