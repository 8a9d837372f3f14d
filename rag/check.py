"""Whether a collection's parts agree; where they do not, `lq index --rebuild` makes them."""

import sqlite3
from pathlib import Path

from rag import vectors
from rag.store import Database

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


def _lexical_sound(database: Database) -> bool:
    try:
        database.connection.execute("INSERT INTO lexical (lexical) VALUES ('integrity-check')")
    except sqlite3.DatabaseError:
        return False
    return True
