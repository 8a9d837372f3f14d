"""Ranked chunks -> passages with the place each comes from. Reads rows; ranks nothing."""

import hashlib
from collections.abc import Sequence

from rag.passage import Passage
from rag.retrieve import Candidate
from rag.store import Database, pages_of

_QUERY = """SELECT c.text, c.first, c.last, c.page, c.heading, f.name, f.path, f.title, f.pages
    FROM chunks c JOIN files f ON f.id = c.file_id WHERE c.id = ?"""


def read(database: Database, ranked: Sequence[tuple[float, Candidate]], k: int) -> list[Passage]:
    """The k best; of chunks with the same text (copies of a file) only the first."""
    found: dict[str, Passage] = {}
    for score, candidate in ranked:
        if len(found) == k:
            break
        for row in database.rows(_QUERY, (candidate.chunk_id,)):
            found.setdefault(row[0], _passage(row, score, candidate))
    return list(found.values())


def _passage(row: tuple, score: float, candidate: Candidate) -> Passage:
    text, first, last, page, heading, name, path, title, pages = row
    return Passage(
        id=hashlib.sha256(f"{path}\0{first}\0{text}".encode()).hexdigest()[:16],
        text=text,
        file=name,
        path=path,
        title=title,
        heading=heading,
        page=page,
        start=first,
        end=last,
        score=score,
        best=candidate.best,
        pages=pages_of(pages),
    )
