"""A collection: one folder on disk that answers questions with passages.

Owns opening, searching and checking; `ingest` fills it. Knows nothing of stores of models or of HTTP.
"""

import re
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rag import check, passages, retrieve
from rag.broken import UnfinishedCollection
from rag.errors import RagError
from rag.passage import Passage
from rag.settings import OtherEmbedder, Settings
from rag.store import FILE_NAME, Database
from rag.vectors import VectorIndex

__all__ = ["Collection", "CollectionInfo", "Passage", "UnknownCollection"]


class QueryEmbedder(Protocol):
    """What a search asks of an embedder (rag.embed.Embedder is one)."""

    fingerprint: str
    name: str

    def queries(self, texts: Sequence[str]) -> np.ndarray: ...


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class InvalidName(RagError):
    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name[:100]!r} is no name of a collection: use 1 to 64 letters, digits, dots, dashes and "
            "underscores, beginning with a letter or digit"
        )


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
    """Safe to share between threads: a search takes a lock (a few ms). Sees what an index run commits."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._index: VectorIndex | None = None
        self._file: tuple[int, int] | None = None  # the one that is open

    @classmethod
    def open(cls, directory: Path) -> "Collection":
        """An existing collection; UnknownCollection lists the folder's siblings otherwise."""
        collection = cls(Path(directory))
        collection._settings()
        return collection

    def search(self, question: str, *, k: int = 5, embedder: QueryEmbedder) -> list[Passage]:
        """The k best passages, best first; refuses an embedder other than the one it was built with."""
        if k < 1:
            raise RagError(f"k is {k}: ask for at least 1 passage")
        with self._lock:
            self._checked(embedder)
        question = unicodedata.normalize("NFC", question)  # as documents are
        query = embedder.queries([question])[0]
        with self._lock:
            settings = self._checked(embedder)
            database, index = self._open(), self._current(settings)
            with database.reading():
                return _best(question, query, database=database, index=index, settings=settings, k=k)

    def info(self) -> CollectionInfo:
        with self._lock:
            settings, database = self._settings(), self._open()
            return CollectionInfo(
                name=self.directory.name,
                embedder=settings.embedder,
                embedder_fingerprint=settings.embedder_fingerprint,
                dimension=settings.dimension,
                chunk_tokens=settings.chunk_tokens,
                overlap=settings.overlap,
                lexical=settings.lexical,
                roots=database.roots(),
                n_files=database.count("files", "reason IS NULL"),
                n_skipped=database.count("files", "reason IS NOT NULL"),
                n_chunks=database.count("chunks"),
                n_vectors=database.count("windows"),
            )

    def verify(self) -> list[str]:
        """What is inconsistent, one sentence each; empty when sound."""
        with self._lock:
            self._settings()
            return check.problems(self.directory, self._open())

    def close(self) -> None:
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = self._index = self._file = None

    def _open(self) -> Database:
        path = self.directory / FILE_NAME
        if self._database is None:
            if not path.is_file():
                raise UnknownCollection(self.directory.name, names(self.directory.parent))
            self._file = _identity(path)
            try:
                self._database = Database(path)
            except UnfinishedCollection:
                raise UnknownCollection(self.directory.name, names(self.directory.parent)) from None
        return self._database

    def _settings(self) -> Settings:
        if self._database is not None and _identity(self.directory / FILE_NAME) != self._file:
            self._forget()  # deleted, and maybe indexed again
        settings = self._open().settings()
        if settings is None:  # its creation was interrupted: nothing was indexed
            self._forget()
            raise UnknownCollection(self.directory.name, names(self.directory.parent))
        return settings

    def _current(self, settings: Settings) -> VectorIndex:
        if self._index is None or self._index.dimension != settings.dimension:
            self._index = VectorIndex.open(self.directory, self._open(), settings.dimension)
        self._index.follow(self._open())
        return self._index

    def _checked(self, embedder: QueryEmbedder) -> Settings:
        settings = self._settings()
        if embedder.fingerprint != settings.embedder_fingerprint:
            roots = self._open().roots()
            name = self.directory.name
            raise OtherEmbedder(name, roots, settings, given=embedder.name, mark=embedder.fingerprint)
        return settings


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another under the same name; None when there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _best(
    question: str, query: np.ndarray, *, database: Database, index: VectorIndex, settings: Settings, k: int
) -> list[Passage]:
    """The k best passages; looks further while copies of one text leave fewer."""
    weight = retrieve.vector_weight(question, settings)
    pool, most = max(retrieve.POOL, 4 * k), max(len(index), database.count("chunks"))
    while True:
        found = retrieve.candidates(
            question, query, database=database, index=index, settings=settings, pool=pool
        )
        best = passages.read(database, retrieve.rank(found, weight=weight), k)
        if len(best) == k or pool >= most:
            return best
        pool *= 4


def directory_of(root: Path, name: str) -> Path:
    """Where the collection `name` lies below the folder of collections; InvalidName for what is no name."""
    if not _NAME.fullmatch(name):
        raise InvalidName(name)
    return root / name


def names(root: Path) -> list[str]:
    """Collections under a folder (`LQ_HOME/collections`), sorted."""
    return sorted(path.parent.name for path in root.glob("*/collection.sqlite"))
