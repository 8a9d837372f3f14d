"""The vector index of a collection: a FAISS file that can be lost, because SQLite can write it again.

A generation is one file and a manifest that names the database's state. The manifest is swapped atomically; a
generation that is behind, cut short or of another database is not believed.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from rag.errors import RagError
from rag.store import Database

MANIFEST = "vectors.json"
#: Beyond this many an exact scan takes more than about 10 ms a question, and inverted lists pay.
EXACT_LIMIT = 300_000
_BLOCK_BYTES = 1 << 20


class UnwrittenIndex(RagError):
    def __init__(self, path: Path, error: Exception) -> None:
        reason = " ".join(str(error).split())[-200:]
        super().__init__(f"{path} cannot be written: {reason}; free space and index again, nothing is lost")


class VectorIndex:
    """Row ids are window ids. Follows its database by difference; never the other way."""

    def __init__(self, dimension: int, index: Any = None, change: int | None = None) -> None:
        self.dimension = dimension
        self.change = change
        self._saved = change
        self._index = _empty(dimension) if index is None else index

    @property
    def on_disk(self) -> bool:
        """Whether this very state was read from disk or written to it."""
        return self.change is not None and self._saved == self.change

    def __len__(self) -> int:
        return self._index.ntotal

    @classmethod
    def open(cls, directory: Path, database: Database, dimension: int) -> "VectorIndex":
        """The generation on disk if it can be believed, brought up to the database either way."""
        loaded = _load(directory, database.meta()["identity"], dimension)
        index = loaded or cls(dimension)
        index.follow(database)
        return index

    def follow(self, database: Database) -> None:
        """Take in windows that came, forget those that went."""
        with database.reading():
            change = database.change()
            if change == self.change:
                return
            wanted, here = database.window_ids(), self.ids()
            gone = np.setdiff1d(here, wanted)
            if 2 * len(gone) > len(here) or _large(len(wanted)) != _large(len(here)):
                self._index, here, gone = _empty(self.dimension, len(wanted)), here[:0], gone[:0]
            if len(gone):
                self._index.remove_ids(gone)
            self._add(database, np.setdiff1d(wanted, here))
        self.change = change

    def _add(self, database: Database, ids: np.ndarray) -> None:
        blocks = list(database.window_vectors(ids.tolist(), self.dimension))
        if not blocks:
            return
        rows = np.concatenate([ids for ids, _ in blocks])
        vectors = np.concatenate([vectors for _, vectors in blocks])
        if not self._index.is_trained:
            self._index.train(vectors)
        self._index.add_with_ids(vectors, rows)

    def ids(self) -> np.ndarray:
        """(n,) int64, ascending."""
        import faiss

        return np.sort(faiss.vector_to_array(self._index.id_map)) if len(self) else np.zeros(0, np.int64)

    def search(self, query: np.ndarray, k: int) -> list[tuple[int, float]]:
        """(window id, cosine) of the k nearest to a (dimension,) vector, nearest first."""
        import faiss

        faiss.omp_set_num_threads(1)  # one question is one scan; waking threads costs more on a busy machine
        scores, ids = self._index.search(query[None].astype(np.float32), max(1, min(k, len(self))))
        return [(int(one), float(score)) for one, score in zip(ids[0], scores[0], strict=True) if one >= 0]

    def save(self, directory: Path, identity: str) -> None:
        """Write this generation beside the last, then point the manifest at it. Raises UnwrittenIndex."""
        path = directory / f"vectors-{self.change}.faiss"
        partials = directory / f"{path.name}.partial", directory / f"{MANIFEST}.partial"
        try:
            self._write(path, *partials, identity=identity)
        except (OSError, RuntimeError) as error:  # FAISS knows no other; the database already has everything
            for partial in partials:
                partial.unlink(missing_ok=True)
            raise UnwrittenIndex(path, error) from error
        for other in directory.glob("vectors-*.faiss*"):
            if other != path:
                other.unlink(missing_ok=True)
        self._saved = self.change

    def _write(self, path: Path, partial: Path, swap: Path, *, identity: str) -> None:
        import faiss

        faiss.write_index(self._index, str(partial))
        facts = {"file": path.name, "identity": identity, "change": self.change, "dimension": self.dimension}
        facts |= {"vectors": len(self), "sha256": _sha256(partial)}
        partial.replace(path)
        swap.write_text(json.dumps(facts), "utf-8")
        with swap.open("rb") as file:
            os.fsync(file.fileno())
        swap.replace(path.with_name(MANIFEST))


def state(directory: Path, database: Database) -> str | None:
    """What is wrong with the generation on disk, as a sentence; None when it is sound and current."""
    settings = database.settings()
    if settings is None or not (directory / MANIFEST).exists():
        return "the vector index is missing"
    index = _load(directory, database.meta()["identity"], settings.dimension)
    if index is None:
        return "the vector index is damaged or of another database"
    if index.change != database.change():
        return f"the vector index is at change {index.change}, the database at {database.change()}"
    if not np.array_equal(index.ids(), database.window_ids()):
        return "the vector index holds other windows than the database"
    return None


def _load(directory: Path, identity: str, dimension: int) -> VectorIndex | None:
    """None for whatever cannot be believed: the caller builds it again from SQLite."""
    import faiss

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
        facts = json.loads((directory / MANIFEST).read_text("utf-8"))
        path = directory / Path(facts["file"]).name
        if (facts["identity"], facts["dimension"]) != (identity, dimension):
            return None
        if _sha256(path) != facts["sha256"]:
            return None
        index = faiss.read_index(str(path))
        if index.d == dimension and index.ntotal == facts["vectors"]:
            return VectorIndex(dimension, index, facts["change"])
    return None


def _large(n_vectors: int) -> bool:
    return n_vectors > EXACT_LIMIT


def _kind(n_vectors: int) -> str:
    if not _large(n_vectors):
        return "IDMap2,SQfp16"
    return f"IDMap2,IVF{int(4 * n_vectors**0.5)},SQ8"


def _empty(dimension: int, n_vectors: int = 0) -> Any:
    import faiss

    index = faiss.index_factory(dimension, _kind(n_vectors), faiss.METRIC_INNER_PRODUCT)
    if _large(n_vectors):
        faiss.extract_index_ivf(index).nprobe = 32
    return index


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
