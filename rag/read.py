"""A file on disk -> rows for the store: bytes, parsed text, chunks, windows and their words.

Embeds nothing and writes nothing; a file that cannot be read comes back with the reason.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rag import lexical, parse
from rag.chunk import Chunk, chunk
from rag.document import Document, Unreadable
from rag.errors import RagError
from rag.settings import Settings
from rag.store import ChunkRow, FileRow, WindowRow, now_ns

#: Tokens of a window that its heading may take: a window without its heading often lacks its subject.
HEADING_TOKENS = 32


class Tokens(Protocol):
    """What reading asks of an embedder."""

    @property
    def window_tokens(self) -> int: ...

    def spans(self, text: str) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True, slots=True)
class ReadFile:
    """Rows of one file and, by hash, the texts whose vectors they need."""

    file: FileRow
    chunks: tuple[ChunkRow, ...]
    texts: dict[bytes, str]


def read(path: Path, name: str, *, tokens: Tokens, settings: Settings, parser: str) -> ReadFile:
    """Read, parse and cut one file."""
    row, data = load(path, name, parser=parser)
    if row.reason is not None:
        return ReadFile(row, (), {})
    try:
        document = parse.parse(path, data)
        chunks = _cut(document, tokens, settings)
    except Unreadable as error:
        return ReadFile(replace(row, reason=str(error)), (), {})
    except RagError:  # the embedder's, for one: no file is to blame
        raise
    except Exception as error:  # a parser's defect costs its file, not the run
        reason = f"its parser failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        # Without a hash it is read again by the next run: memory may have been short, or a library missing.
        return ReadFile(replace(row, reason=reason, sha256=""), (), {})
    if not chunks:
        return ReadFile(replace(row, reason="it holds no text"), (), {})
    texts: dict[bytes, str] = {}
    rows = tuple(_row(document.text, one, tokens, settings, texts) for one in chunks)
    row = replace(row, title=document.title, pages=document.pages, note=document.note)
    return ReadFile(row, rows, texts)


def load(path: Path, name: str, *, parser: str) -> tuple[FileRow, bytes]:
    """The row of a file before it is parsed, with its bytes; times are from before reading."""
    seen_ns, data, size, mtime, reason = now_ns(), b"", 0, 0, None
    try:
        facts = path.stat()
        size, mtime = facts.st_size, facts.st_mtime_ns
        data = path.read_bytes()
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or error}"
    sha256 = hashlib.sha256(data).hexdigest() if reason is None else ""
    row = FileRow(str(path), name, path.stem, size, mtime, seen_ns, sha256, parser, reason=reason)
    return row, data


def _cut(document: Document, tokens: Tokens, settings: Settings) -> list[Chunk]:
    room = tokens.window_tokens
    return chunk(
        document,
        tokens.spans,
        chunk_tokens=settings.chunk_tokens,
        overlap=settings.overlap,
        window_tokens=room - min(HEADING_TOKENS, room // 4),
    )


def _row(text: str, one: Chunk, tokens: Tokens, settings: Settings, texts: dict[bytes, str]) -> ChunkRow:
    heading, windows = _short(one.heading, tokens), []
    for first, last in one.windows:
        embedded = f"{heading}\n{text[first:last]}" if heading else text[first:last]
        key = hashlib.sha256(embedded.encode()).digest()[:16]
        texts[key] = embedded
        windows.append(WindowRow(first, last, key))
    body = text[one.start : one.end]
    return ChunkRow(
        first=one.start,
        last=one.end,
        page=one.page,
        heading=one.heading,
        text=body,
        heading_words=lexical.words(one.heading, settings.lexical),
        words=lexical.words(body, settings.lexical),
        windows=tuple(windows),
    )


def _short(heading: str, tokens: Tokens) -> str:
    """The end of a heading path: the deepest headings say most. One token is left for the line's end."""
    room = min(HEADING_TOKENS, tokens.window_tokens // 4) - 1
    spans = tokens.spans(heading)
    return heading if len(spans) <= room else heading[spans[-room][0] :]
