"""The truth of a collection: files, chunks, windows, vectors and words in one SQLite file.

A file enters or leaves in one transaction, with its words. Everything else on disk can be rebuilt from here.
"""

import contextlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from rag.broken import BrokenCollection, FullDisk, UnfinishedCollection
from rag.lexical import TOKENIZE
from rag.settings import Settings

FILE_NAME = "collection.sqlite"
SCHEMA_VERSION = 2
VECTOR = np.dtype("<f2")  # float16: half the bytes; recall is the same, see docs/log.md

_LEXICAL = f"CREATE VIRTUAL TABLE lexical USING fts5 (heading, body, tokenize = '{TOKENIZE}')"
_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE files (
    id INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE, name TEXT NOT NULL, title TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, seen_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    parser TEXT NOT NULL, pages TEXT NOT NULL, reason TEXT, note TEXT NOT NULL DEFAULT '');
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, file_id INTEGER NOT NULL REFERENCES files ON DELETE CASCADE,
    first INTEGER NOT NULL, last INTEGER NOT NULL, page INTEGER, heading TEXT NOT NULL, text TEXT NOT NULL);
CREATE INDEX chunks_of_file ON chunks (file_id);
CREATE TABLE windows (
    id INTEGER PRIMARY KEY AUTOINCREMENT, chunk_id INTEGER NOT NULL REFERENCES chunks ON DELETE CASCADE,
    first INTEGER NOT NULL, last INTEGER NOT NULL, hash BLOB NOT NULL);
CREATE INDEX windows_of_chunk ON windows (chunk_id);
CREATE INDEX windows_of_hash ON windows (hash);
CREATE TABLE vectors (hash BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID;
{_LEXICAL};
CREATE TRIGGER forget_words AFTER DELETE ON chunks BEGIN DELETE FROM lexical WHERE rowid = old.id; END;
PRAGMA user_version = {SCHEMA_VERSION};
"""
_FROM_1 = f"""
ALTER TABLE files ADD COLUMN note TEXT NOT NULL DEFAULT '';
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file as it was when it was read.

    `reason` says why it was skipped, None when it is searchable; `note` what of it could not be read.
    """

    path: str
    name: str
    title: str
    size_bytes: int
    mtime_ns: int
    seen_ns: int
    sha256: str
    parser: str
    pages: tuple[tuple[int, int], ...] = ()
    reason: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class WindowRow:
    first: int
    last: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """`heading_words` and `words` are what full-text search reads."""

    first: int
    last: int
    page: int | None
    heading: str
    text: str
    heading_words: str
    words: str
    windows: tuple[WindowRow, ...]


class Database:
    """One connection; usable from several threads, one at a time."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        mode = "rwc" if create else "rw"
        with self._explained():
            address = f"{path.absolute().as_uri()}?mode={mode}"
            self.connection = sqlite3.connect(
                address, uri=True, timeout=30, isolation_level=None, check_same_thread=False
            )
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = NORMAL")
            self.connection.execute("PRAGMA foreign_keys = ON")
            self._check_version(create)

    def _check_version(self, create: bool) -> None:
        version = self.connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and create:
            with self.transaction():
                for statement in _statements(_SCHEMA):
                    self.connection.execute(statement)
                self.set_meta({"identity": uuid.uuid4().hex, "change": "0", "roots": "[]"})
        elif version == 1:
            with self.transaction():
                for statement in _statements(_FROM_1):
                    self.connection.execute(statement)
        elif version != SCHEMA_VERSION:
            empty = version == 0 and not self.connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
            self.connection.close()
            if empty:
                raise UnfinishedCollection(self.path, "its creation was interrupted")
            raise BrokenCollection(self.path, f"its schema is version {version}, not {SCHEMA_VERSION}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or none; other writers wait."""
        with self._explained():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            finally:
                self._roll_back()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Several statements that see one state."""
        with self._explained():
            self.connection.execute("BEGIN")
            try:
                yield self.connection
            finally:
                self._roll_back()

    def _roll_back(self) -> None:
        """End what is still open; SQLite has rolled back by itself after a full disk, for one."""
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raise (FullDisk if is_full else BrokenCollection)(self.path, error) from error

    def close(self) -> None:
        self.connection.close()

    # --- meta

    def meta(self) -> dict[str, str]:
        with self._explained():
            return dict(self.connection.execute("SELECT key, value FROM meta"))

    def set_meta(self, values: Mapping[str, str]) -> None:
        self.connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))

    def settings(self) -> Settings | None:
        """None in a collection whose creation was interrupted."""
        text = self.meta().get("settings")
        return Settings(**json.loads(text)) if text else None

    def roots(self) -> tuple[str, ...]:
        return tuple(json.loads(self.meta().get("roots", "[]")))

    def change(self) -> int:
        """Counts the transactions that changed what a search finds."""
        with self._explained():
            row = self.connection.execute("SELECT value FROM meta WHERE key = 'change'").fetchone()
        return int(row[0])

    def _changed(self) -> None:
        self.connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'change'")

    def start(self, settings: Settings, roots: Sequence[str]) -> None:
        """Empty the collection and fix how it is built; vectors of the same embedder are worth keeping."""
        before = self.settings()
        with self.transaction() as sql:
            sql.execute("DELETE FROM files")
            if before is None or before.embedder_fingerprint != settings.embedder_fingerprint:
                sql.execute("DELETE FROM vectors")
            self.set_meta({"settings": json.dumps(asdict(settings)), "roots": json.dumps(list(roots))})
            self._changed()

    def succeed(self, other: Path, *, with_vectors: bool) -> None:
        """Go on where another database stands: its identity, later row ids and changes; maybe its vectors."""
        with self._explained():
            self.connection.execute("ATTACH ? AS other", (str(other),))
        try:
            with self.transaction() as sql:
                if with_vectors:
                    sql.execute("INSERT OR IGNORE INTO vectors SELECT * FROM other.vectors")
                sql.execute("INSERT OR REPLACE INTO meta SELECT * FROM other.meta WHERE key = 'identity'")
                query = "SELECT max(CAST(value AS INTEGER)) + 1 FROM ({}) WHERE key = 'change'"
                both = "SELECT * FROM meta UNION ALL SELECT * FROM other.meta"
                change = sql.execute(query.format(both)).fetchone()[0]
                self.set_meta({"change": str(change)})
                both = "SELECT * FROM sqlite_sequence UNION ALL SELECT * FROM other.sqlite_sequence"
                last = sql.execute(f"SELECT name, max(seq) FROM ({both}) GROUP BY name").fetchall()
                sql.execute("DELETE FROM sqlite_sequence")
                sql.executemany("INSERT INTO sqlite_sequence VALUES (?, ?)", last)
        finally:
            self.connection.execute("DETACH other")

    def copy_to(self, other: "Database") -> None:
        """Replace all that another database holds, in one transaction of its own."""
        with other._explained():
            self.connection.backup(other.connection)

    def set_roots(self, roots: Sequence[str]) -> None:
        with self.transaction():
            self.set_meta({"roots": json.dumps(list(roots))})

    # --- files

    def files(self) -> dict[str, FileRow]:
        """Every file by path."""
        names = ", ".join(field.name for field in fields(FileRow))
        rows = [FileRow(*row) for row in self.rows(f"SELECT {names} FROM files ORDER BY path")]
        return {row.path: replace(row, pages=pages_of(str(row.pages))) for row in rows}

    def put_file(self, file: FileRow, chunks: Sequence[ChunkRow]) -> None:
        """Replace a file and all that hangs on it. The vectors of its windows must be there."""
        with self.transaction() as sql:
            sql.execute("DELETE FROM files WHERE path = ?", (file.path,))
            values = asdict(file) | {"pages": json.dumps(file.pages)}
            marks = ", ".join(f":{key}" for key in values)
            cursor = sql.execute(f"INSERT INTO files ({', '.join(values)}) VALUES ({marks})", values)
            for chunk in chunks:
                self._put_chunk(sql, cursor.lastrowid, chunk)
            self._changed()

    @staticmethod
    def _put_chunk(sql: sqlite3.Connection, file_id: int | None, chunk: ChunkRow) -> None:
        row = (file_id, chunk.first, chunk.last, chunk.page, chunk.heading, chunk.text)
        cursor = sql.execute(
            "INSERT INTO chunks (file_id, first, last, page, heading, text) VALUES (?, ?, ?, ?, ?, ?)", row
        )
        chunk_id = cursor.lastrowid
        sql.execute(
            "INSERT INTO lexical (rowid, heading, body) VALUES (?, ?, ?)",
            (chunk_id, chunk.heading_words, chunk.words),
        )
        sql.executemany(
            "INSERT INTO windows (chunk_id, first, last, hash) VALUES (?, ?, ?, ?)",
            [(chunk_id, window.first, window.last, window.hash) for window in chunk.windows],
        )

    def touch(self, path: str, *, size_bytes: int, mtime_ns: int, seen_ns: int) -> None:
        """Note new times of a file whose bytes are the same."""
        with self.transaction() as sql:
            values = (size_bytes, mtime_ns, seen_ns, path)
            sql.execute("UPDATE files SET size_bytes = ?, mtime_ns = ?, seen_ns = ? WHERE path = ?", values)

    def remove(self, paths: Sequence[str]) -> None:
        with self.transaction() as sql:
            sql.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in paths])
            self._changed()

    # --- vectors

    def missing(self, hashes: Sequence[bytes]) -> list[bytes]:
        """Those without a vector, each once, in order."""
        with self.reading() as sql:
            find = "SELECT 1 FROM vectors WHERE hash = ?"
            return [one for one in dict.fromkeys(hashes) if sql.execute(find, (one,)).fetchone() is None]

    def put_vectors(self, hashes: Sequence[bytes], vectors: np.ndarray) -> None:
        """Kept before their file is, so that an interrupted run has embedded nothing in vain."""
        rows = [(one, row.tobytes()) for one, row in zip(hashes, vectors.astype(VECTOR), strict=True)]
        with self.transaction() as sql:
            sql.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    def drop_unused_vectors(self) -> None:
        with self.transaction() as sql:
            sql.execute("DELETE FROM vectors WHERE hash NOT IN (SELECT hash FROM windows)")

    def window_ids(self) -> np.ndarray:
        """(n,) int64, ascending."""
        with self._explained():
            rows = self.connection.execute("SELECT id FROM windows ORDER BY id").fetchall()
        return np.array([row[0] for row in rows], np.int64)

    def window_vectors(self, ids: Sequence[int], dimension: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of (ids, vectors (n, dimension) float32)."""
        block = 500
        for first in range(0, len(ids), block):
            some = [int(one) for one in ids[first : first + block]]
            marks = ", ".join("?" * len(some))
            query = f"SELECT w.id, vector FROM windows w JOIN vectors USING (hash) WHERE w.id IN ({marks})"
            with self._explained():
                rows = self.connection.execute(query, some).fetchall()
            raw = b"".join(row[1] for row in rows)
            if len(raw) != len(rows) * dimension * VECTOR.itemsize:
                raise BrokenCollection(self.path, f"it holds vectors that are not of {dimension} numbers")
            vectors = np.frombuffer(raw, VECTOR).astype(np.float32).reshape(len(rows), dimension)
            yield np.array([row[0] for row in rows], np.int64), vectors

    def rows(self, query: str, values: Sequence[object] = ()) -> list[tuple]:
        """What a question to the database answers."""
        with self._explained():
            return self.connection.execute(query, tuple(values)).fetchall()

    def count(self, table: str, condition: str = "TRUE") -> int:
        with self._explained():
            return self.connection.execute(f"SELECT count(*) FROM {table} WHERE {condition}").fetchone()[0]


def now_ns() -> int:
    return time.time_ns()


def _statements(script: str) -> Iterator[str]:
    """Statements of a script, so that they run inside our transaction."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


def pages_of(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((begins, number) for begins, number in json.loads(text))
