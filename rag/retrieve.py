"""A question -> chunks, by meaning and by words.

Candidates come from the vector index and from FTS5; each gets its exact cosine (of its best window) and its
BM25, and one weighted sum ranks them. Knows rows, not files on disk.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag import lexical
from rag.settings import Settings
from rag.store import Database
from rag.vectors import VectorIndex

#: Candidates that each side brings at first; more where copies of one text crowd out the others.
POOL = 60
#: Share of the vector side; chosen by nDCG@10 on Cranfield (benchmarks/cranfield.py, docs/log.md).
VECTOR_WEIGHT = 0.8
#: A heading's words count more than the body's.
HEADING_WEIGHT = 1.5
_LISTED = "SELECT value FROM json_each(?)"  # any number of ids; SQLite bounds the number of `?`


@dataclass(frozen=True, slots=True)
class Candidate:
    """A chunk, the cosine and character span of its best window, and its BM25 (0 without a common word)."""

    chunk_id: int
    cosine: float
    best: tuple[int, int]
    bm25: float


def candidates(
    question: str, query: np.ndarray, *, database: Database, index: VectorIndex, settings: Settings, pool: int
) -> list[Candidate]:
    """Chunks near the question or sharing a word with it, in no order; each side brings `pool` at most."""
    words = _lexical(database, lexical.match(question, settings.lexical), pool)
    near = [window for window, _ in index.search(query, pool)] if len(index) else []
    chunk_ids = set(words) | set(_chunks_of(database, near))
    spans = _windows_of(database, sorted(chunk_ids))
    best: dict[int, tuple[float, tuple[int, int]]] = {}
    for ids, vectors in database.window_vectors(sorted(spans), settings.dimension):
        for window, cosine in zip(ids.tolist(), (vectors @ query).tolist(), strict=True):
            chunk_id, span = spans[window]
            if chunk_id not in best or cosine > best[chunk_id][0]:
                best[chunk_id] = (cosine, span)
    return [Candidate(one, cosine, span, words.get(one, 0.0)) for one, (cosine, span) in best.items()]


def rank(found: Sequence[Candidate], *, weight: float = VECTOR_WEIGHT) -> list[tuple[float, Candidate]]:
    """(score 0..1, candidate), best first; equal scores keep the order of the collection."""
    top = max((one.bm25 for one in found), default=0.0) or 1.0

    def score(one: Candidate) -> float:
        value = weight * max(0.0, one.cosine) + (1 - weight) * one.bm25 / top
        return min(1.0, value)

    return sorted(((score(one), one) for one in found), key=lambda pair: (-pair[0], pair[1].chunk_id))


def vector_weight(question: str, settings: Settings) -> float:
    """Less the more of the question is Hangul that the embedder has only letters for."""
    share = 0.0 if settings.reads_hangul else lexical.hangul_share(question)
    return VECTOR_WEIGHT * (1 - share)


def _lexical(database: Database, expression: str | None, limit: int) -> dict[int, float]:
    """BM25 by chunk; FTS5 gives it negative, best lowest."""
    if expression is None:
        return {}
    query = f"""SELECT rowid, bm25(lexical, {HEADING_WEIGHT}, 1.0) AS score FROM lexical
        WHERE lexical MATCH ? ORDER BY score LIMIT ?"""
    return {chunk: -score for chunk, score in database.rows(query, (expression, limit))}


def _chunks_of(database: Database, windows: Sequence[int]) -> list[int]:
    query = f"SELECT DISTINCT chunk_id FROM windows WHERE id IN ({_LISTED})"
    return [row[0] for row in database.rows(query, [json.dumps(windows)])]


def _windows_of(database: Database, chunks: Sequence[int]) -> dict[int, tuple[int, tuple[int, int]]]:
    """Window id -> (chunk id, character span)."""
    query = f"SELECT id, chunk_id, first, last FROM windows WHERE chunk_id IN ({_LISTED})"
    rows = database.rows(query, [json.dumps(chunks)])
    return {row[0]: (row[1], (row[2], row[3])) for row in rows}
