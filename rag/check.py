"""Whether a collection's parts agree, and how to make them agree again without reading a document."""

import sqlite3
from pathlib import Path

from rag import lexical, vectors
from rag.store import LEXICAL, Database
from rag.vectors import VectorIndex

_UNEMBEDDED = "hash NOT IN (SELECT hash FROM vectors)"
_WORDLESS = "id NOT IN (SELECT rowid FROM lexical)"


def problems(directory: Path, database: Database) -> list[str]:
    """One sentence each; empty when sound."""
    said = [row[0] for row in database.rows("PRAGMA integrity_check")]
    found = [f"the database says: {sentence}" for sentence in said if sentence != "ok"]
    if n := len(database.rows("PRAGMA foreign_key_check")):
        found.append(f"{n} rows point to nothing")
    if n := database.count("windows", _UNEMBEDDED):
        found.append(f"{n} windows have no vector")
    if n := database.count("chunks", _WORDLESS):
        found.append(f"{n} chunks have no words for full-text search")
    if not _lexical_sound(database):
        found.append("the full-text index is damaged")
    if problem := vectors.state(directory, database):
        found.append(problem)
    return found


def repair(directory: Path, database: Database) -> list[str]:
    """Say what was done. Files that lost a vector are forgotten: the next index run reads them again."""
    done = []
    if lost := _files_without_vectors(database):
        database.remove(lost)
        done.append(f"forgot {len(lost)} files that had windows without vectors; index again to read them")
    if database.count("chunks", _WORDLESS) or not _lexical_sound(database):
        done.append(f"wrote the full-text index again, {_rewrite_words(database)} chunks")
    if n := database.drop_unused_vectors():
        done.append(f"dropped {n} vectors that no window uses")
    if vectors.state(directory, database):
        settings = database.settings()
        assert settings is not None
        index = VectorIndex(settings.dimension)
        index.follow(database)
        index.save(directory, database.meta()["identity"])
        done.append(f"built the vector index again, {len(index)} vectors")
    return done


def _files_without_vectors(database: Database) -> list[str]:
    query = f"""SELECT DISTINCT f.path FROM files f JOIN chunks c ON c.file_id = f.id
        JOIN windows w ON w.chunk_id = c.id WHERE w.{_UNEMBEDDED}"""
    return [row[0] for row in database.rows(query)]


def _lexical_sound(database: Database) -> bool:
    try:
        database.connection.execute("INSERT INTO lexical (lexical) VALUES ('integrity-check')")
    except sqlite3.DatabaseError:
        return False
    return True


def _rewrite_words(database: Database) -> int:
    settings = database.settings()
    assert settings is not None
    chunks = database.rows("SELECT id, heading, text FROM chunks")
    rows = [
        (one, lexical.words(heading, settings.lexical), lexical.words(text, settings.lexical))
        for one, heading, text in chunks
    ]
    with database.transaction() as sql:
        sql.execute("DROP TABLE lexical")
        sql.execute(LEXICAL)
        sql.executemany("INSERT INTO lexical (rowid, heading, body) VALUES (?, ?, ?)", rows)
    return len(rows)
