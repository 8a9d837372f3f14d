"""Bring a collection up to its folders: read what is new or edited, forget what is gone, embed what is new.

One writer at a time. A file enters in one transaction, after its vectors; stopping anywhere loses nothing
that was embedded, and the next run goes on.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock, Timeout

from rag import parse
from rag.discover import Discovery, Found, is_missing, normal, printable, walk
from rag.errors import RagError
from rag.lexical import best_mode
from rag.read import ReadFile, load, read
from rag.rebuild import discard, scratch
from rag.settings import CHUNK_TOKENS, OVERLAP, OtherChunks, OtherEmbedder, Settings, check_chunks
from rag.store import FILE_NAME, Database, FileRow
from rag.vectors import VectorIndex

Progress = Callable[[str, int, int], None]  # (what happens, files done, files in all)

#: Windows embedded and committed together; small files share a batch.
BATCH = 128
#: A file written this shortly before it was read may have been written again within one clock tick.
_RACY_NS = 2_000_000_000
CHUNKER_VERSION = "1"


class DocumentEmbedder(Protocol):
    """What indexing asks of an embedder (rag.embed.Embedder is one)."""

    fingerprint: str
    name: str

    @property
    def dimension(self) -> int: ...

    @property
    def window_tokens(self) -> int: ...

    @property
    def reads_hangul(self) -> bool: ...

    def spans(self, text: str) -> Sequence[tuple[int, int]]: ...

    def documents(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class IndexReport:
    """Files by what happened to them; `skipped` are (path, reason), `notes` (path, what was not read)."""

    added: int
    changed: int
    unchanged: int
    removed: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]
    chunks: int
    embedded_windows: int
    seconds: float


class CollectionBusy(RagError):
    def __init__(self, name: str) -> None:
        super().__init__(f"another process is indexing the collection {name!r}; wait until it has ended")


class NothingToIndex(RagError):
    def __init__(self, paths: Sequence[Path], skipped: Sequence[tuple[str, str]]) -> None:
        where = ", ".join(map(printable, paths)) or "no path"
        reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped[:3])
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        found = f"{len(skipped)} files skipped ({reasons}{more})" if skipped else "it holds no document"
        suffixes = " ".join(sorted(parse.SUFFIXES)[:8])
        super().__init__(f"nothing to index in {where}: {found}; give files such as {suffixes}")
        self.skipped = tuple(skipped)


def index(
    collection_dir: Path,
    paths: Sequence[Path],
    *,
    embedder: DocumentEmbedder,
    chunk_tokens: int | None = None,
    overlap: int | None = None,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> IndexReport:
    """Make the collection hold what the paths hold; files of other paths given earlier stay.

    Lengths in tokens; None means as before, 512 and 64 at first. `rebuild` starts from nothing but vectors;
    what the collection holds stays until the new one is whole.
    """
    started = time.monotonic()
    given = [normal(path) for path in paths]
    directory = Path(collection_dir)
    with _writing(directory) as database:
        before = None if rebuild else database.settings()
        known = (*database.roots(), *database.files()) if before else ()
        found = walk(given, known=known)
        settings = _settings(database, before, embedder, chunk_tokens=chunk_tokens, overlap=overlap)
        roots = [str(path) for path in given if printable(path) == str(path)]
        run = _Run(database, embedder, settings, progress or (lambda *_: None), found)
        if rebuild and database.settings() is not None:
            _rebuild(run, roots, paths)
        else:
            if before is None:
                database.start(settings, roots)
            run.take(roots)
            if before is None:
                run.check_any(paths)
        all_roots = dict.fromkeys([*(str(normal(root)) for root in database.roots()), *roots])
        deleted = [root for root in all_roots if _below(Path(root), roots) and is_missing(Path(root))]
        database.set_roots([root for root in all_roots if root not in deleted])
        run.finish(directory)
        return run.report(time.monotonic() - started)


def _rebuild(run: "_Run", roots: Sequence[str], paths: Sequence[Path]) -> None:
    """Build beside the collection, then take its place; a run that finds nothing leaves it as it was."""
    old = run.database
    try:
        with scratch(old, run.settings, roots) as run.database:
            run.take(roots)
            run.check_any(paths)
            run.database.copy_to(old)
    except NothingToIndex:
        discard(old.path.parent)
        raise
    run.database = old


@contextmanager
def _writing(directory: Path) -> Iterator[Database]:
    """The database under its lock; a folder that was made for nothing is taken away again."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.parent / f".{directory.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CollectionBusy(directory.name) from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        existed = (directory / FILE_NAME).exists()
        try:
            database = Database(directory / FILE_NAME, create=True)
        except RagError:
            if not existed:
                shutil.rmtree(directory)
            raise
        try:
            yield database
        except BaseException:
            worthless = not existed and not database.count("vectors")
            database.close()
            if worthless:
                shutil.rmtree(directory)
            raise
        database.close()
    finally:
        lock.release()


def _settings(
    database: Database,
    before: Settings | None,
    embedder: DocumentEmbedder,
    *,
    chunk_tokens: int | None,
    overlap: int | None,
) -> Settings:
    """Those of the collection, unless what is asked for differs; new ones where there are none."""
    name, roots = database.path.parent.name, database.roots()
    if before is None:
        tokens = CHUNK_TOKENS if chunk_tokens is None else chunk_tokens
        shared = min(OVERLAP, (tokens - 1) // 2) if overlap is None else overlap
        check_chunks(tokens, shared)
        return Settings(
            embedder=embedder.name,
            embedder_fingerprint=embedder.fingerprint,
            dimension=embedder.dimension,
            chunk_tokens=tokens,
            overlap=shared,
            lexical=best_mode(),
            reads_hangul=embedder.reads_hangul,
        )
    if before.embedder_fingerprint != embedder.fingerprint:
        raise OtherEmbedder(name, roots, before, given=embedder.name, mark=embedder.fingerprint)
    tokens = before.chunk_tokens if chunk_tokens is None else chunk_tokens
    shared = before.overlap if overlap is None else overlap
    check_chunks(tokens, shared)
    if (tokens, shared) != (before.chunk_tokens, before.overlap):
        raise OtherChunks(name, roots, before, tokens=tokens, overlap=shared)
    return before


@dataclass(slots=True)
class _Run:
    """One pass over the files; `waiting` are read and wait for vectors."""

    database: Database
    embedder: DocumentEmbedder
    settings: Settings
    progress: Progress
    found: Discovery
    known: dict[str, FileRow] = field(default_factory=dict)
    waiting: list[ReadFile] = field(default_factory=list)
    done: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    embedded: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.found.files)

    def take(self, roots: Sequence[str]) -> None:
        """Read what is new or edited, forget what is gone below the roots."""
        self.known = self.database.files()
        self.skipped = [(one.path, one.reason) for one in self.found.skipped]
        for file in self.found.files:
            self.progress(f"reading {file.name}", self.done, self.total)
            row = self._current(file)
            if row is None:
                self.waiting.append(self._read(file))
                if sum(len(one.texts) for one in self.waiting) >= BATCH:
                    self.flush()
            else:
                self._count("unchanged", row)
        self.flush()
        self._forget(roots)

    def _forget(self, roots: Sequence[str]) -> None:
        """Files below the given roots that are there no more; a folder that cannot be looked at keeps its."""
        present = {str(file.path) for file in self.found.files}
        unseen = [one.path for one in self.found.skipped if one.unseen]
        gone = [
            path
            for path in self.known.keys() - present
            if _below(normal(path), roots) and not _below(normal(path), unseen)
        ]
        if gone:
            self.database.remove(gone)
        self.counts["removed"] = sum(self.known[path].reason is None for path in gone)

    def check_any(self, paths: Sequence[Path]) -> None:
        """Raise NothingToIndex unless something can be searched."""
        if not self.database.count("files", "reason IS NULL"):
            raise NothingToIndex(paths, self.skipped)

    def flush(self) -> None:
        """Embed what the waiting files need, then let each enter."""
        texts = {key: text for one in self.waiting for key, text in one.texts.items()}
        wanted = self.database.missing(list(texts))
        for first in range(0, len(wanted), BATCH):
            self.progress(f"embedding {first} of {len(wanted)} windows", self.done, self.total)
            some = wanted[first : first + BATCH]
            self.database.put_vectors(some, self.embedder.documents([texts[key] for key in some]))
            self.embedded += len(some)
        for one in self.waiting:
            self.database.put_file(one.file, one.chunks)
            before = self.known.get(one.file.path)
            self._count("added" if before is None or before.reason is not None else "changed", one.file)
        self.waiting.clear()

    def finish(self, directory: Path) -> None:
        self.progress("writing the vector index", self.done, self.total)
        self.database.drop_unused_vectors()
        vectors = VectorIndex.open(directory, self.database, self.settings.dimension)
        if not vectors.on_disk:
            vectors.save(directory, self.database.meta()["identity"])
        discard(directory)

    def report(self, seconds: float) -> IndexReport:
        count = self.counts.get
        return IndexReport(
            added=count("added", 0),
            changed=count("changed", 0),
            unchanged=count("unchanged", 0),
            removed=count("removed", 0),
            skipped=tuple(self.skipped),
            notes=tuple(self.notes),
            chunks=self.database.count("chunks"),
            embedded_windows=self.embedded,
            seconds=seconds,
        )

    def _current(self, file: Found) -> FileRow | None:
        """The stored row, if the file is still what it was: by size and time, in doubt by its bytes."""
        row = self.known.get(str(file.path))
        if row is None or row.parser != _version() or not row.sha256:
            return None
        try:
            facts = file.path.stat()
        except OSError:
            return None
        same = (facts.st_size, facts.st_mtime_ns) == (row.size_bytes, row.mtime_ns)
        if same and row.seen_ns - row.mtime_ns > _RACY_NS:
            return row
        now, _ = load(file.path, file.name, parser=row.parser)
        if now.sha256 != row.sha256:
            return None
        times = {"size_bytes": now.size_bytes, "mtime_ns": now.mtime_ns, "seen_ns": now.seen_ns}
        self.database.touch(row.path, **times)
        return replace(row, **times)

    def _read(self, file: Found) -> ReadFile:
        return read(file.path, file.name, tokens=self.embedder, settings=self.settings, parser=_version())

    def _count(self, what: str, row: FileRow) -> None:
        self.done += 1
        if row.reason is not None:
            self.skipped.append((row.path, row.reason))
        else:
            self.counts[what] = self.counts.get(what, 0) + 1
        if row.note:
            self.notes.append((row.path, row.note))


def _version() -> str:
    """A file read by other code is read again; its vectors stay where its text did."""
    return f"{parse.PARSER_VERSION}/{CHUNKER_VERSION}"


def _below(path: Path, roots: Sequence[str]) -> bool:
    return any(path.is_relative_to(root) for root in roots)
